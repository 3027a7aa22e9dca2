"""Eight simulated devices for every test; scripts that need torch are run by hand, not collected."""

import jax

jax.config.update("jax_num_cpu_devices", 8)

collect_ignore_glob = ["benchmarks/*", "golden/record*.py"]
