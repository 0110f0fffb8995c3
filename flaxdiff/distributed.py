"""Many devices and hosts: the names of `flaxdiff.trainer.parallel`, where they are derived; this path is kept for programs that know it."""
from .trainer.parallel import (DataParallel, allreduce_bytes, count_flops, fsdp_sharding, several_steps,
                               start_hosts, step_seconds)

__all__ = ["DataParallel", "allreduce_bytes", "count_flops", "fsdp_sharding", "several_steps", "start_hosts", "step_seconds"]
