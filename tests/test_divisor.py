"""csrc/cuda/sm90/divisor.h, by which kernels divide, as its host side computes it."""

import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import new_seed

PROGRAM = r"""
#include <cstdio>
#include <random>
#define __host__
#define __device__
#include "divisor.h"

int main() {
  std::mt19937 random(SEED);
  const unsigned most = 0x7fffffff;
  long wrong = 0;
  const auto check = [&](unsigned d, unsigned n) {
    wrong += mra::cuda::sm90::Divisor(d).divide(n) != n / d;
  };
  for (unsigned d = 1; d <= 5000; ++d) {
    check(d, 0);
    check(d, most);
    for (int i = 0; i < 50; ++i) check(d, random() >> 1);
    const unsigned any = random() % (most / d) + 1;
    for (unsigned times : {1u, 2u, any, most / d}) {
      check(d, times * d);
      check(d, times * d - 1);
    }
  }
  for (int i = 0; i < 300000; ++i) {
    const unsigned d = (random() >> 1 >> random() % 31) | 1;
    check(d, random() >> 1);
    check(d, most / d * d - 1);
  }
  std::printf("%ld", wrong);
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_divisor(tmp_path):
    """Against the division of the language: small divisors, multiples and their neighbours."""
    source, program = tmp_path / "divisor.cpp", tmp_path / "divisor"
    source.write_text(PROGRAM)
    include = Path(__file__).parents[1] / "csrc" / "cuda" / "sm90"
    subprocess.run(
        ["g++", "-O1", "-std=c++17", f"-DSEED={new_seed()}", f"-I{include}", source, "-o", program],
        check=True,
    )  # fmt: skip
    assert subprocess.run([program], check=True, capture_output=True, text=True).stdout == "0"
