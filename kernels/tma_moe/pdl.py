"""Programmatic dependent launch (PDL): how one kernel may begin before the kernel before it has ended. The contract.

A kernel that is launched with PDL starts as soon as every program of the kernel before it (its predecessor) has either
triggered (`griddepcontrol.launch_dependents`) or ended. `griddepcontrol.wait` then holds it until the predecessor has
ended and all that it wrote can be seen. A kernel launched without PDL starts when its predecessor has ended.

Every kernel here keeps four rules, and so may be put next to any other, ours or not:

1. Every program waits. So a kernel has ended only after its predecessor has, and what holds for neighbours holds for a
   whole chain: after its own wait a kernel sees whatever was launched before it.
2. It waits before it writes anything. Memory that an earlier kernel still reads is never overwritten.
3. It waits before it triggers: `take_turn`. A successor that has started can therefore rely on the predecessor's
   predecessor having ended, although it has not waited itself.
4. Before its wait a kernel reads only what nothing writes (weights), or what was written at least two launches
   earlier, *within one operation*, where the launch in between is known to keep rule 3.

Triggering before waiting breaks the third rule, and with it every early read: two launches later a kernel starts while
the first is still writing. Eager launches are too slow to show that; a CUDA graph shows it in nearly every replay of a
short kernel. The tests look for the order of the two instructions in the compiled code, and on a GPU they run long
chains in graphs.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def take_turn(PDL: tl.constexpr):
    """Waits for the kernel before, then lets the next one start. PDL is False where nothing runs on a GPU."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
