"""Runs transformers' own code as it is written, on the CPU, without the network."""

import os

os.environ["TORCH_COMPILE_DISABLE"] = "1"  # compiling takes minutes and a C++ compiler
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny products are faster in one thread


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore")  # torch's own, at import
