// The stages of MRA attention, one table of functions per device.
//
//   pool (-> weigh keys) -> plan -> coarse -> fine (-> order 1)
//
// csrc/attention.cpp runs them in that order and is the same for every device; csrc/cpu and
// csrc/cuda each fill one `Stages`. Everything here is already checked: see common/checks.h.
//
// Symbols (docs/notation.md): B batch, H query heads, Hk key heads (H % Hk == 0; query head h reads
// key head h / (H / Hk)), N queries, M keys, D head_dim (multiple of 8, at most 256),
// nq = ceil(N / block_q), nk = ceil(M / block_k). T is the dtype of query, key and value; acc is
// float64 for float64 and float32 for everything else.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace mra {

using at::Tensor;
using OptTensor = std::optional<Tensor>;
using OptDensity = std::optional<at::ArrayRef<double>>;  // of all heads, or of each

enum class Coarse { none, block, row };
enum class Selection { row, global };
// How a block's keys weigh in its mean: all the same, or as the queries weigh them.
enum class Pool { even, centred, sampled };

// A resolution coarser than block_q x block_k, as a call asks for it.
struct Level {
  int64_t block;  // rows in its blocks, of queries and of keys
  int64_t cells;  // that a block of queries may split into cells of the next resolution
};

// A resolution of one call, from shapes: common/levels.h.
struct Resolution {
  int64_t block_q, block_k;
  int64_t nq, nk;            // its blocks
  int64_t first_q, first_k;  // where they stand among the blocks of all resolutions
};

struct Options {
  int64_t block_q, block_k;  // each of 16, 32, 64, 128
  std::optional<int64_t> blocks_per_row;
  std::optional<double> density;  // exactly one of the two budgets is set; of heads the highest
  Coarse coarse;
  int64_t order;  // 0 or 1
  Selection selection;
  int64_t diagonal_blocks, first_blocks;
  bool causal;                         // then N == M
  double scale;                        // of q . k, natural units
  std::vector<double> head_density{};  // of each head, where each has its own; no levels, by row
  std::vector<Level> levels{};  // coarsest first; empty: block_q x block_k is the only resolution
  // With levels, set by attention.cpp: block_q x block_k first, the coarsest last. Means, counts
  // and row lists then hold the blocks of all resolutions, in this order, where their shapes say
  // nq or nk; list entries count the blocks of their own resolution.
  std::vector<Resolution> resolutions{};
  Pool pool = Pool::even;  // else coarse = row, no levels; causal: centred
  bool keep = true;        // forward: what backward would else make again
};

// Means over the valid rows of each block, and how many there are.
struct Pooled {
  Tensor mean;   // [B, H or Hk, n, D] acc, contiguous; zeros for an empty block
  Tensor count;  // [B, n] int32, contiguous
  // CUDA: what was launched last writes neither of them, and a plan may run beside it.
  bool beside = false;
  // Of keys, where defined: what a plan adds to the scores of each block, [B, Hk, n] acc.
  Tensor bias{};
};

// Lists of blocks. As rows: for each query block its key blocks; as columns: for each key block
// its query blocks. Entry t of list r of a head is index[start[r] + t], t < count[r], ascending.
// What lies outside the lists is unspecified. An entry out of range is skipped, never followed.
struct BlockList {
  Tensor start;  // [B, H, n] int32
  Tensor count;  // [B, H, n] int32
  Tensor index;  // [B, H, capacity] int32
  // CUDA, where it made the lists: [2] int32, zeros. Kernels count there what they have taken.
  Tensor queues{};
  // CUDA: what columns are made from. A kernel beside that one must not get its memory.
  std::array<Tensor, 3> held{};
};

// Softmax state of the block-coarse part of one query block, the same for all of its rows.
struct CoarseState {
  Tensor mean;  // [B, H, nq, D] acc: sum_y exp(b_xy - lse_x) v_mean_y; zeros where lse is -inf
  Tensor lse;   // [B, H, nq] acc: log sum_y exp(b_xy), b_xy = L_xy + log c_y, over y not in S_x
  // With levels, mean and lse are of the coarse cells of all resolutions together (nq: of
  // block_q), and this is what each resolution has of their mass, [B, H, nq, resolutions] acc.
  Tensor parts{};
};

struct Inputs {
  Tensor query;          // [B, H, N, D] T, any strides with the last one 1 (16-byte aligned rows)
  Tensor key, value;     // [B, Hk, M, D] T, likewise
  OptTensor key_mask;    // [B, M] bool, contiguous, true = takes part
  OptTensor query_mask;  // [B, N] bool, contiguous
  // Backward: strides of the gradients of query, key and value.
  std::array<std::array<int64_t, 4>, 3> grad_strides{};
};

// The pooled inputs: keys and values for the coarse part, queries for coarse = block, and both
// queries and keys for a plan; the rest may be undefined. `moments` are C and Sigma of order 1
// without causal, once they are made: see moments_dim.
struct PooledInputs {
  Tensor query;        // [B, H, nq, D] acc
  Tensor key;          // [B, Hk, nk, D] acc
  Tensor value;        // [B, Hk, nk, D] acc
  Tensor key_count;    // [B, nk] int32
  Tensor query_count;  // [B, nq] int32
  Tensor moments;
  // key and value in T, where the stage pool writes them: for coarse = row, half types on CUDA.
  Tensor key_rounded{}, value_rounded{};
  // Where Options.pool is not even: key and value are weighted means, and these are the weight of
  // each key within its block, [B, Hk, nk * block_k] acc, zeros where masked; and what stands for
  // key_count, [B, Hk, nk] acc: on CUDA as it is, 0 for an empty block, on the CPU its log.
  Tensor weights{}, mass{};
  // ... and with order 1 t_i and what is added to all coarse logits of a row, [B, H, N] acc; or,
  // with `moments`, what fine makes them from: the centre, [B, Hk, D] acc, moments as it multiplies
  // them (FineMoments), and the centre times these, [B, Hk, 2, P] acc (moments_dim).
  Tensor variance{}, row_bias{}, centre{}, fine_moments{}, moment_scales{}, centre_term{};
  // ... or, beside row_bias, what fine adds to a row times its coarse share: gamma_i u_i, [B, H, N,
  // D] T.
  Tensor term{};
  at::ScalarType type = at::kFloat;  // T of the inputs that these are means of
  // CUDA: as in Pooled; in the backward pass the same of what centred_delta reads, which may start
  // beside it. And what the kernel launched last reads: memory that is given back too early could
  // be that of what runs beside it.
  bool beside = false;
  Tensor held{};
  Tensor moments_before{};  // CUDA, under causal: those of the keys before each chunk of a head
};

// What Options.pool other than even makes of the inputs (docs/algorithm.md). All acc.
struct Centred {
  PooledInputs pooled;  // key, value, key_count, query_count, weights and what comes with them
  // [B, Hk, D]: the mean valid query of the group. Under causal [B, Hk, nq + 1, D]: of those before
  // each block of queries, and of all.
  Tensor centre;
  Tensor key_bias{};  // [B, Hk, nk], where asked for: Pooled.bias, beta_y of docs/algorithm.md
  // With order 1, C and Sigma: [B, Hk, 2, D, D], on CUDA as moments are kept. Under causal, where
  // they are in memory, of each unit of rows: [B, Hk, units, 2, D, D].
  Tensor moments{};
  Tensor slope{};  // CUDA, set by centred_delta: gamma_i u_i . dO_i, [B, H, N]
  // CUDA, under causal with order 1: queries less their centres, zeros where masked, [B, H, N, D]
  // T.
  Tensor queries{};
};

// A plan made inside of a call, and the coarse state where it was made along with it.
struct Planned {
  BlockList rows;
  std::optional<CoarseState> coarse;
};

// What fine reads besides the inputs.
struct Prepared {
  PooledInputs pooled;
  std::optional<Centred> centred;  // where Options.pool is not even
  Planned planned;
};

// What the operator forward returns: out, lse, coarse_share, row_start, row_count, row_index, and
// what backward reads again: query_mean, key_mean, value_mean, query_count, key_count, moments,
// query_centre, key_weights, block_mass.
using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                 Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
// What the operator backward returns: the gradients of query, key and value.
using BackwardResult = std::tuple<Tensor, Tensor, Tensor>;

struct FineResult {
  Tensor out;  // [B, H, N, D] T, memory laid out as (B, N, H, D)
  Tensor lse;  // [B, H, N] acc, natural log, -inf for a row without weight
  // [B, H, N] acc: coarse part of each row's mass; undefined unless order 1 applies. With levels
  // [B, H, resolutions, N].
  Tensor share;
  bool order1 = false;  // the order-1 term is in `out`
};

// A forward that ran all stages at once. `pooled`: what is kept for backward.
struct HeadResult {
  FineResult fine;
  BlockList rows;
  PooledInputs pooled;
};

struct Grads {
  Tensor query, key, value;
};

// True where the order-1 term exists: order = 1 and a coarse part to correct.
inline bool has_order1(const Options& o) { return o.order == 1 && o.coarse != Coarse::none; }

// Whether means, and with them moments, are kept for backward if anything is (Options.keep). Under
// causal every block of queries has moments of its own. With levels those of block_k are kept.
inline bool keeps_means(const Options& o) { return o.coarse != Coarse::none; }
// What is kept beside weighted means: the centre, the weights and the mass.
inline bool keeps_weights(const Options& o) { return o.pool != Pool::even; }
inline bool keeps_moments(const Options& o) { return has_order1(o) && keeps_means(o) && !o.causal; }
// Kept moments: [B, Hk, 2, P, P], the C and the Sigma of each key head, zeros beyond D; bfloat16
// for bfloat16, else acc.
inline at::ScalarType moments_type(at::ScalarType T) {
  return T == at::kBFloat16 || T == at::kDouble ? T : at::kFloat;
}
inline int64_t moments_dim(int64_t D) { return D <= 32 ? 32 : D <= 64 ? 64 : D <= 128 ? 128 : 256; }

// Gradient through C, S, gamma and the query. That through P is left to the caller.
struct Order1Grads {
  Tensor coarse_delta;  // [B, H, N] acc: delta_i - gamma_i u_i . dO_i; with levels
                        // [resolutions, B, H, N]
  // With Inputs.grad_strides: fine_backward may take these tensors and add to them.
  Tensor query;       // [B, H, N, D] T, zeros at rows whose share is 0
  Tensor key, value;  // [B, Hk, M, D] T, zeros at masked keys
  // Where defined: what every valid key of a block gets besides, [B, Hk, nk, D] acc.
  Tensor key_block{}, value_block{};
  // CUDA, where fine_backward is to make key and value from it, which are undefined then: dC and
  // dSigma, as moments are kept.
  Tensor moment_grads{};
  // CUDA, where what was launched last makes nothing of coarse_delta, so that fine_backward may
  // start beside it: what it reads.
  Tensor held{};
  Tensor delta{};  // as Stages.delta
};

// Gradient state of the rows of one query block under the block-coarse form (docs/algorithm.md):
// with M_x = min_i lse_i over rows of x that have weight,
struct BlockRows {
  Tensor lse;    // [B, H, nq] acc: M_x; +inf for a block without such a row
  Tensor grad;   // [B, H, nq, D] acc: g_x = sum_i exp(M_x - lse_i) dO_i
  Tensor delta;  // [B, H, nq] acc: e_x = sum_i exp(M_x - lse_i) delta_i
};

// CUDA: what centred_delta made of the coarse part besides. Then coarse_delta is delta, and
// query_extra has all that the coarse part and order 1 give to the queries but for what comes
// through the centre.
struct CoarseRows {
  Tensor shares;        // [2, B, Hk, nk, D] acc: gradients of the pooled keys and values
  Tensor mass_grad;     // [B, Hk, nk] acc: of the log mass of each block
  Tensor moment_grads;  // dC and dSigma, as moments are kept
  Tensor of_rows;       // parts of what the centre gets, [B, H, parts, D] acc
};

struct FineBackward {
  Tensor grad_out;      // [B, H, N, D] T, any strides with the last one 1
  Tensor lse;           // [B, H, N] acc
  Tensor delta;         // [B, H, N] acc: dO_i . o_i - dlse_i, for exact keys
  Tensor coarse_delta;  // [B, H, N] acc: for coarse keys (differs from delta under order 1; with
                        // levels it is [resolutions, B, H, N] then)
  // Added to the results where defined:
  Tensor query_block;             // [B, H, nq, D] acc: added to every valid row of the block
  Tensor key_block, value_block;  // [B, Hk, nk, D] acc: added to every valid row of the block
  Tensor query_extra;             // [B, H, N, D] T
  Tensor key_extra, value_extra;  // [B, Hk, M, D] T
  // Order1Grads.moment_grads, and the means that they are of; Order1Grads.held, which fine_backward
  // drops once nothing that it launches can run beside the reader any more.
  Tensor moment_grads{};
  const PooledInputs* means = nullptr;
  mutable Tensor held{};
  // Where defined, set to the sum of each row's gradients of its coarse logits.
  Tensor coarse_sum{};  // [B, H, N] acc
  // With weighted means, for what Stages.centred_grads would do where it is null.
  Tensor share{};  // [B, H, N] acc, with order 1
  const Centred* centred = nullptr;
  CoarseRows coarse_rows{};
  // Where defined, filled: gradients of the pooled keys and values, and of the log mass of each
  // block, summed over the heads of a group.
  Tensor pooled_grads{};  // [2, B, Hk, nk, D] acc
  Tensor mass_grad{};     // [B, Hk, nk] acc
};

struct Stages {
  // x [B, H, L, D], mask [B, L] bool.
  Pooled (*pool)(const Tensor& x, const OptTensor& mask, int64_t block);

  // What a call needs of its inputs: queries and keys where asked for, keys and values where there
  // is a coarse part. May make the moments of order 1 along with these.
  PooledInputs (*pool_inputs)(const Inputs&, const Options&, bool query, bool key);

  // Selection of reference.py::plan. Budgets and capacity come from common/budget.h. `pooled` is
  // set for coarse = block; its state may be left to `coarse`. What lies behind the lists is zeros.
  Planned (*plan)(const Pooled& query, const Pooled& key, const std::optional<PooledInputs>& pooled,
                  int64_t N, const Options&);

  // Rows to columns (nk lists), deterministic.
  BlockList (*transpose)(const BlockList& rows, int64_t nk);

  // coarse = block only.
  CoarseState (*coarse)(const PooledInputs&, const BlockList& rows, const Options&);
  // Gradients of the pooled inputs, each divided by the count of its block: what every valid row of
  // the block gets. [B, H, nq, D], [B, Hk, nk, D] x2, acc. With levels, those of coarser blocks are
  // added to the block_q and block_k that they hold.
  Grads (*coarse_backward)(const PooledInputs&, const BlockList& rows, const BlockList& columns,
                           const BlockRows&, const Options&);

  // `state` is set for coarse = block, `pooled` for coarse = row. May take the order-1 term along
  // where there are `moments`.
  FineResult (*fine)(const Inputs&, const BlockList& rows, const std::optional<CoarseState>& state,
                     const std::optional<PooledInputs>& pooled, const Tensor& moments,
                     const Options&);
  // `pooled` is set for coarse = row: the gradients of the pooled keys and values are then spread
  // over the rows of their blocks inside. Results have T and the shapes of the inputs, memory laid
  // out as (B, L, H, D).
  Grads (*fine_backward)(const Inputs&, const BlockList& rows, const BlockList& columns,
                         const std::optional<PooledInputs>& pooled, const FineBackward&,
                         const Options&);

  // rowsum(dO * o) - dlse, [B, H, N] acc; grad_lse [B, H, N] acc or undefined.
  Tensor (*delta)(const Tensor& grad_out, const Tensor& out, const Tensor& grad_lse);
  BlockRows (*block_rows)(const Tensor& grad_out, const Tensor& lse, const Tensor& delta,
                          int64_t block_q);
  // Both, with one reading of dO.
  std::pair<Tensor, BlockRows> (*delta_and_block_rows)(const Tensor& grad_out, const Tensor& out,
                                                       const Tensor& grad_lse, const Tensor& lse,
                                                       int64_t block_q);

  // What a block mean throws away, damped; only where has_order1 and fine left it out. Adds to
  // result.out, in place,
  //   gamma_i P_i u_i,   u_i = s q_i C,   gamma_i = 1 / (1 + t_i / 4),   t_i = s^2 q_i S q_i^T
  // with P = result.share. C and S (Sigma in docs/notation.md) are the within-block moments of
  // (k, v) and (k, k), averaged over the valid keys; with causal, over the key blocks wholly before
  // the query block. With levels once for every resolution, each with a share and moments of its
  // own.
  // Leaves the moments in PooledInputs where they are kept.
  void (*order1)(FineResult& result, const Inputs&, PooledInputs&, const Options&);
  // Makes delta, too.
  Order1Grads (*order1_backward)(const Tensor& grad_out, const Tensor& share, const Tensor& out,
                                 const Tensor& grad_lse, const Inputs&, const PooledInputs&,
                                 const Options&);

  // pool, plan, coarse and fine in one, for heads short enough to be held whole; nullopt for what
  // it doesn't serve. May be null.
  std::optional<HeadResult> (*forward_head)(const Inputs&, const Options&) = nullptr;

  // All stages before fine in one, likewise; without a plan unless it is asked for.
  std::optional<Prepared> (*prepare)(const Inputs&, bool plan, const Options&) = nullptr;

  // Options.pool other than even; null where a device has none. `weigh_keys` makes the centre and
  // the weights from the means and counts of queries, and what a plan asks for: its bias, and the
  // means and counts of keys that `plain` lacks. `centre` adds means and moments and, unless the
  // call is of a backward pass and centred_delta makes them, variance and row_bias or what fine
  // makes them from. The others are order 1: the term, added to result.out in place; grads.delta
  // and coarse_delta, from its grad_out and share, perhaps with coarse_rows; and the gradients but
  // those through the logits, added in place. The last is null where fine_backward does it.
  Centred (*weigh_keys)(const Inputs&, PooledInputs& plain, bool bias, const Options&) = nullptr;
  void (*centre)(Centred&, const Inputs&, bool backward, const Options&) = nullptr;
  void (*centred_term)(FineResult& result, const Inputs&, const Centred&, const Options&) = nullptr;
  void (*centred_delta)(FineBackward& grads, const Tensor& out, const Tensor& grad_lse,
                        const Inputs&, Centred&, const BlockList& rows, const Options&) = nullptr;
  void (*centred_grads)(const Grads&, const FineBackward&, const Inputs&, const Options&) = nullptr;
};

const Stages& cpu_stages();
#ifdef MRA_WITH_CUDA
const Stages& cuda_stages();
#endif

}  // namespace mra
