"""`python -m bitnet_jax COMMAND`, the same as `bitnet COMMAND`."""

from bitnet_jax.cli import main

main()
