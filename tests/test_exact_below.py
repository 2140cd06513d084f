"""exact_below: short calls run exact attention, in the module, in mra_sdpa and in Hugging Face
models, and mean there what MRA attention would have meant."""

import itertools

import pytest
import torch
from helpers import DEVICES, relative_error
from test_module import EXACT, HEADS, SPARSE, B, E, M, N, close, padding, run, tensors
from torch import nn
from torch.nn import functional as F

import mra_attention as mra
from mra_attention import MRAConfig, MRAMultiheadAttention, crossover, replace_attention

SHORT = {f"exact: {crossover.BELOW}": 1}


@pytest.fixture(autouse=True)
def nothing_counted_or_measured(monkeypatch):
    monkeypatch.setattr(crossover, "_measured", {})
    for front in (mra.modules, mra.sdpa, mra.transformers):
        front.stats(reset=True)


def limited(exact_below, config=SPARSE, **kwargs):
    ours = MRAMultiheadAttention(
        E, HEADS, batch_first=True, config=config, exact_below=exact_below, **kwargs
    )
    nn.init.uniform_(ours.out_proj.bias, -0.3, 0.3)
    return ours


# The module


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "float", "one sequence whole"])
@pytest.mark.parametrize(("cross", "is_causal"), [(False, False), (False, True), (True, False)])
def test_short_calls_mean_what_mra_means(cross, is_causal, mask, need_weights):
    """Against density 1: values, weights and gradients, rows without a key included."""
    ours = limited(1000).double()
    dense = MRAMultiheadAttention.from_mha(ours, EXACT)
    inputs = [x.double() for x in tensors(True, cross)]
    length = M if cross else N
    kpm = None if mask is None else padding(length)
    if mask == "one sequence whole":
        kpm[1] = True
    if mask == "float":
        kpm = torch.zeros(kpm.shape).masked_fill(kpm, -torch.inf)
    kwargs = dict(key_padding_mask=kpm, is_causal=is_causal, need_weights=need_weights)
    a, b = run(ours, inputs, **kwargs), run(dense, inputs, **kwargs)
    close(a[0], b[0])
    if need_weights:
        close(a[1], b[1])
    for x, y in zip(a[2], b[2], strict=True):
        close(x, y)
    assert mra.modules.stats() == {**SHORT, "mra": 1}
    assert ours.exact_calls == 1 and dense.exact_calls == 0
    if mask == "one sequence whole":
        close(a[0][1], ours.out_proj.bias.expand(N, E))


def test_only_calls_with_fewer_keys():
    ours, x = limited(50), torch.randn(B, 60, E)
    never = MRAMultiheadAttention.from_mha(ours, SPARSE)
    for n, m, exact in ((60, 49, 1), (40, 50, 0), (60, 60, 0), (10, 49, 1)):
        mra.modules.stats(reset=True)
        out, _ = ours(x[:, :n], x[:, :m], x[:, :m], need_weights=False)
        assert mra.modules.stats(reset=True) == (SHORT if exact else {"mra": 1})
        same = torch.equal(out, never(x[:, :n], x[:, :m], x[:, :m], need_weights=False)[0])
        # 49 keys are two blocks of 32: density 0.3 takes one of them.
        assert same == (not exact)
    assert ours.exact_calls == 2 and never.exact_calls == 0


def test_none_and_zero_never():
    x = torch.randn(B, 5, E)
    for exact_below in (None, 0):
        limited(exact_below)(x, x, x)
    assert mra.modules.stats() == {"mra": 2}


def test_dropout_applies():
    ours, x = limited(1000, dropout=0.5), torch.randn(B, N, E)
    first, weights = ours(x, x, x, average_attn_weights=False)
    assert 0.3 < (weights == 0).float().mean() < 0.7
    assert not torch.equal(first, ours(x, x, x)[0])
    assert not torch.equal(*(ours(x, x, x, need_weights=False)[0] for _ in range(2)))
    ours.eval()
    assert torch.equal(*(ours(x, x, x, need_weights=False)[0] for _ in range(2)))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_input(layout):
    ours = limited(1000).double()
    dense = MRAMultiheadAttention.from_mha(ours, EXACT)
    rows = [torch.randn(n, E, dtype=torch.float64) for n in (45, 7, 20)]
    x = torch.nested.as_nested_tensor(rows, layout=layout)
    for need_weights in (False, True):
        a, b = (m(x, x, x, need_weights=need_weights) for m in (ours, dense))
        for got, expected in zip(a[0].unbind(), b[0].unbind(), strict=True):
            close(got, expected)
        if need_weights:
            close(a[1], b[1])
            assert (a[1][1, 7:] == 0).all()  # queries that are padding
    assert ours.exact_calls == 2 and dense.exact_calls == 0


def test_what_is_exact_anyway_keeps_its_reason():
    x = torch.randn(B, N, E)
    limited(1000)(x, x, x, attn_mask=torch.randn(N, N))
    limited(1000, add_zero_attn=True)(x, x, x)
    limited(1000, add_bias_kv=True)(x, x, x)
    limited(1000)(x, x, x, key_padding_mask=torch.randn(B, N))  # a bias on the scores
    assert mra.modules.stats() == {
        "exact: attn_mask": 1, "exact: add_zero_attn": 1, "exact: add_bias_kv": 1,
        "exact: key_padding_mask": 1,
    }  # fmt: skip


def test_every_way_to_set_it():
    mha = nn.MultiheadAttention(E, HEADS)
    assert MRAMultiheadAttention.from_mha(mha, SPARSE, 64).exact_below == 64
    assert MRAMultiheadAttention.from_mha(mha, SPARSE).exact_below is None
    assert "exact_below='auto'" in repr(limited("auto")) and "exact" not in repr(limited(None))
    model = nn.ModuleDict({"a": mha, "b": nn.Sequential(nn.MultiheadAttention(E, HEADS))})
    assert replace_attention(model, SPARSE, exact_below=64) == 2
    assert model["a"].exact_below == model["b"][0].exact_below == 64
    assert replace_attention(model, SPARSE) == 2 and model["a"].exact_below is None


@pytest.mark.parametrize("wrong", [True, 2.0, torch.tensor(3), [4], -1, "fast", ""])
def test_wrong_values(wrong):
    error = ValueError if isinstance(wrong, str) or wrong is not True and wrong == -1 else TypeError
    mha = nn.MultiheadAttention(E, HEADS)
    q = torch.randn(1, 2, 8, 8)
    for call in (
        lambda: MRAMultiheadAttention(E, HEADS, exact_below=wrong),
        lambda: MRAMultiheadAttention.from_mha(mha, SPARSE, wrong),
        lambda: replace_attention(nn.Sequential(mha), SPARSE, exact_below=wrong),
        lambda: mra.replace_sdpa(SPARSE, wrong),
        lambda: mra.mra_sdpa(q, q, q, exact_below=wrong),
    ):
        with pytest.raises(error, match="exact_below: got .*, expected None, an int .* 'auto'"):
            call()


@pytest.mark.parametrize("exact_below", [50, "auto"])
def test_compiled_with_dynamic_lengths(exact_below, monkeypatch):
    """One program on each side of the threshold, whatever the lengths."""
    monkeypatch.setattr(crossover, "FALLBACK", 50)
    monkeypatch.setattr(crossover, "_measure", None)  # a call would fail
    ours = limited(exact_below).eval()
    graphs = []

    def backend(graph, _):
        graphs.append(any("mra_attention" in str(n.target) for n in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(ours, backend=backend, fullgraph=True, dynamic=True)
    explicit = MRAMultiheadAttention.from_mha(ours, SPARSE, 50)
    for n in (20, 30, 70, 49, 50, 80, 10):
        x = torch.randn(B, n, E)
        got, _ = compiled(x, x, x, need_weights=False)
        torch.testing.assert_close(got, explicit(x, x, x, need_weights=False)[0])
    assert graphs == [False, True]


# scaled_dot_product_attention


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_sdpa(device, is_causal, heads):
    shape = (2, 4, 40, 16) if heads else (2, 40, 16)
    q, k, v = (torch.randn(shape, device=device, requires_grad=True) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    got = mra.mra_sdpa(q, k, v, is_causal=is_causal, config=SPARSE, exact_below=41)
    assert mra.sdpa.stats(reset=True) == SHORT and torch.equal(got, expected)
    with mra.replace_sdpa(SPARSE, exact_below=41):
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, is_causal=is_causal), expected)
    assert mra.sdpa.stats(reset=True) == SHORT
    with mra.replace_sdpa(SPARSE, exact_below=40):
        F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    assert mra.sdpa.stats() == {"mra": 1}


def test_sdpa_inside_another():
    """What the inner one runs exactly isn't caught by the outer one."""
    q, k, v = torch.randn(3, 2, 4, 90, 16).unbind()
    expected = F.scaled_dot_product_attention(q, k, v)
    x, ours = torch.randn(B, N, E), limited(1000)
    plain = ours(x, x, x, need_weights=False)[0]
    with mra.replace_sdpa(SPARSE):
        assert relative_error(F.scaled_dot_product_attention(q, k, v), expected) > 1e-3
        assert torch.equal(ours(x, x, x, need_weights=False)[0], plain)
        with mra.replace_sdpa(SPARSE, exact_below=100):
            assert torch.equal(F.scaled_dot_product_attention(q, k, v), expected)
    assert mra.sdpa.stats() == {"mra": 1, **SHORT}


def test_sdpa_masks_grouped_heads_scale_dropout():
    q, k, v = (torch.randn(2, h, 40, 16, dtype=torch.float64) for h in (4, 2, 2))
    mask = torch.arange(40)[None] < torch.tensor([[30], [0]])  # nothing for the second one
    options = dict(enable_gqa=True, scale=0.3)
    for m in (mask[:, None, None], mask[:, None, None].expand(2, 4, 40, 40)):
        got = mra.mra_sdpa(q, k, v, m, **options, config=SPARSE, exact_below=100)
        close(got, mra.mra_sdpa(q, k, v, m, **options, config=EXACT))
        assert not got[1].any()
    close(
        mra.mra_sdpa(q[:, 0], k[:, 0], v[:, 0], mask[:, None], config=SPARSE, exact_below=100),
        mra.mra_sdpa(q[:, 0], k[:, 0], v[:, 0], mask[:, None], config=EXACT),
    )
    assert mra.sdpa.stats() == {f"exact: {crossover.BELOW}": 3, "mra": 3}
    dropped = [
        mra.mra_sdpa(q, k, v, dropout_p=0.5, enable_gqa=True, config=SPARSE, exact_below=100)
        for _ in range(2)
    ]
    assert not torch.equal(*dropped)


# transformers


@pytest.mark.parametrize(("exact_below", "reason"), [(131, SHORT), (130, {"mra": 1})])
def test_transformers(exact_below, reason):
    transformers = pytest.importorskip("transformers")
    mra.transformers.register("mra-short", SPARSE, exact_below)
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=512,
    )  # fmt: skip
    model = transformers.BertModel(config).double().eval()
    ids = torch.randint(0, 99, (3, 130))
    mask = torch.arange(130) < torch.tensor([[130], [60], [5]])
    outs = []
    for name in ("sdpa", "mra-short"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            out = model(ids, attention_mask=mask.long()).last_hidden_state
        outs.append(out[mask])
    assert mra.transformers.stats() == reason
    error = relative_error(outs[1], outs[0])
    assert error <= 1e-12 if reason == SHORT else error > 1e-6
    for wrong, kind in ((True, TypeError), ("fast", ValueError)):
        with pytest.raises(kind, match="exact_below"):
            mra.transformers.register("mra-short", SPARSE, wrong)


# "auto"


@pytest.fixture
def measured(monkeypatch):
    """The arguments of each measurement; 40 keys is its result."""
    seen = []

    def measure(*args):
        seen.append(args)
        return 40

    monkeypatch.setattr(crossover, "_measure", measure)
    return seen


def test_auto_measures_once(measured):
    ours = limited("auto")
    for n, exact in ((39, True), (40, False), (39, True), (45, False)):
        mra.modules.stats(reset=True)
        x = torch.randn(B, n, E)
        ours(x, x, x)
        assert mra.modules.stats() == (SHORT if exact else {"mra": 1})
    form = SPARSE.replace(pool="centred")  # what "auto" is there
    assert measured == [(torch.device("cpu"), torch.float32, E // HEADS, form)]
    # Equal configs are one, another config, head dim or dtype is not; half types are one.
    q = torch.randn(1, 2, 39, 16)
    for config, dtype in itertools.product(
        (SPARSE, MRAConfig(density=0.3, block_size=(32, 32)), EXACT),
        (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    ):
        x = q.to(dtype)
        mra.mra_sdpa(x, x, x, config=config, exact_below="auto")
    assert mra.sdpa.stats() == {f"exact: {crossover.BELOW}": 12}
    assert len(measured) == 1 + 2 * 3
    assert {args[2] for args in measured[1:]} == {16}


def test_auto_under_autocast_measures_the_dtype_that_runs(measured):
    q = torch.randn(1, 2, 39, 16)
    with torch.autocast("cpu", torch.bfloat16):
        mra.mra_sdpa(q, q, q, exact_below="auto")
        mra.mra_sdpa(*[q.double()] * 3, exact_below="auto")
    assert [args[1] for args in measured] == [torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("outside", [False, True])
def test_auto_compiled_under_autocast(outside, dynamic, measured):
    """The number of the dtype that runs, with autocast inside the program and around it."""
    q = torch.randn(1, 2, 300, 16)
    crossover.tokens("cpu", torch.float16, 16, SPARSE)  # 40: MRA; float32 would be exact

    def call(q):
        return mra.mra_sdpa(q, q, q, config=SPARSE, exact_below="auto")

    def cast(q):
        with torch.autocast("cpu", torch.bfloat16):
            return call(q)

    torch._dynamo.reset()
    options = dict(backend="eager", fullgraph=True, dynamic=dynamic)
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        out = torch.compile(call if outside else cast, **options)(q)
    assert out.dtype == torch.bfloat16 and mra.sdpa.stats(reset=True) == {"mra": 1}
    torch.compile(call, **options)(q)
    assert mra.sdpa.stats() == SHORT and len(measured) == 1


def test_auto_never_measures_what_it_may_not(measured):
    """While a program is traced, and while a mode watches: the fallback, or what is known."""
    from torch.utils.flop_counter import FlopCounterMode

    ours, q = limited("auto").eval(), torch.randn(1, 2, 300, 16)
    x = torch.randn(B, 300, E)
    with FlopCounterMode(display=False):
        ours(x, x, x)
    torch._dynamo.reset()
    torch.compile(ours, backend="eager", fullgraph=True)(x, x, x)
    torch.compile(mra.mra_sdpa, backend="eager", fullgraph=True, dynamic=True)(
        q, q, q, config=SPARSE, exact_below="auto"
    )
    assert mra.modules.stats(reset=True) == {f"exact: {crossover.BELOW}": 2}
    assert mra.sdpa.stats(reset=True) == SHORT and measured == []
    assert crossover.tokens("cpu", torch.float32, E // HEADS, SPARSE) == 40 and len(measured) == 1
    torch._dynamo.reset()
    torch.compile(ours, backend="eager", fullgraph=True)(x, x, x)
    with FlopCounterMode(display=False):
        ours(x, x, x)
    assert mra.modules.stats() == {"mra": 2} and len(measured) == 1


@pytest.mark.parametrize("crossing", [0, 64, 65, 512, 4096, 10**6])
def test_measurement_finds_the_first_length(crossing, monkeypatch):
    timed = []

    def seconds(call, device):
        # Two calls a length: exact attention, then MRA attention.
        length = crossover.LENGTHS[len(timed) // 2]
        timed.append(length)
        ours = len(timed) % 2 == 0
        return 1.0 if not ours or length < crossing else 0.5

    monkeypatch.setattr(crossover, "_seconds", seconds)
    got = crossover.tokens("cpu", torch.float32, 8, SPARSE)
    lengths = [n for n in crossover.LENGTHS if n >= crossing]
    assert got == (lengths[0] if lengths else 2 * crossover.LENGTHS[-1])
    assert timed[-1] == min(got, crossover.LENGTHS[-1])


@pytest.mark.parametrize("device", DEVICES)
def test_a_real_measurement(device):
    """Ends, leaves the generators alone, and what it says is among what it may say."""
    state = torch.get_rng_state()
    config = MRAConfig(blocks_per_row=1, block_size=64, coarse="none", order=0)
    with torch.autocast(device, torch.bfloat16):
        got = crossover.tokens(device, torch.float32, 20, config)
    assert got in (*crossover.LENGTHS, 2 * crossover.LENGTHS[-1])
    assert torch.equal(state, torch.get_rng_state())
    assert crossover.tokens(device, torch.float32, 20, config) == got


@pytest.mark.gpu
def test_auto_in_a_cuda_graph(measured):
    ours = limited("auto").cuda().eval()
    x = torch.randn(B, 300, E, device="cuda")
    with torch.no_grad():
        MRAMultiheadAttention.from_mha(ours, SPARSE, 1024)(x, x, x, need_weights=False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ours(x, x, x, need_weights=False)
    assert measured == [] and ours.exact_calls == 1
