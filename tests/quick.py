"""Programs of which the equations are tested and not what fusing does to them: a third less to compile."""

from functools import partial

import jax

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
quick_jit = partial(jax.jit, compiler_options=QUICK)
