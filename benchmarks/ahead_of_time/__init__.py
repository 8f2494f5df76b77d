"""Compiles every Triton kernel for named GPU architectures, without a GPU, and bounds what the machine code uses.

    python -m benchmarks.ahead_of_time --arch sm_90 gfx942

The public operators are called on meta tensors: their launchers choose tiles and launch options as they would on the device,
Triton specialises strides and alignment as it would there, and a hook takes the request where it would be compiled. So the
kernels compiled here are those that run. Exit status 1, and a line for each breach, when a kernel spills registers, wants more
shared memory than the device has, on sm_90 leaves a 16-bit product of 64 rows or more off wgmma or keeps it from the tensor
cores' rate, computes an address in integers too narrow for it, or when a kernel or a shipped tile is reached by no case.

    python -m benchmarks.ahead_of_time --warm --arch sm_90 --jobs 16

compiles instead, into Triton's cache, the kernels that ``benchmarks.gpu`` will launch.

    cases.py       what is compiled: add an operator's uses here
    collecting.py  from a case to the kernels it would compile
    targets.py     the architectures: their limits, and how their assembly is read
    warming.py     what benchmarks.gpu will launch
    compiling.py   the kernels compiled, their figures, and the bounds these break
    wgmma.py       what the loops that multiply do on sm_90, and what keeps them from the tensor cores' rate
    addresses.py   the ranges of the integers that addresses are made of
"""
