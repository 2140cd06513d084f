"""Speed, memory and accuracy of MRA attention beside exact attention and sparse peers.

``python -m benchmarks --help``; README.md here has the commands, the cases and the formulas.
"""
