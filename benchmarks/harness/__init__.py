"""What the benchmarks share: cases, the gate, timing, options, rows, and how a run goes.

``cases``: problems on real input. ``gate``: nothing is timed before it is right. ``timing``: time, bandwidth, memory.
``options``: the command line. ``rows``: JSON lines and how they are grouped. ``run``: how a run goes.
"""
