"""Executes the PTX that Triton makes of the kernels, on the CPU, and looks for what a GPU would do without a word.

- :mod:`.program`: PTX text, taken apart. :mod:`.memory`: memory that remembers who touched it.
- :mod:`.machine`: registers, control flow, one block of threads in lockstep, one block after another.
- :mod:`.arithmetic`, :mod:`.movement`, :mod:`.matrix_units`: the instructions of sm_80 and sm_90a that Triton emits.
- :mod:`.emulate`: the package's own launchers, each launch compiled for a GPU that is not there and executed.

Found: accesses out of bounds and of what nothing wrote; races between warps, or between the programs of a launch; reads of
asynchronous copies under way; registers and shared memory touched while an asynchronous product uses them; missing fences and
barriers. Counted: instructions, barriers, bytes, and round trips to memory.

Limits. Control flow must be the same for a whole block, as Triton's is. Approximate instructions (ex2, rcp …) are exact here, a
warp never runs ahead of another, and it is PTX, not machine code: registers, spills and time are not seen.
"""
