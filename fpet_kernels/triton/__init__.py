"""The Triton backend. Importing this package imports nothing; :mod:`.ops` is imported when the backend is first asked for.

- :mod:`.configs`: frozen launch configurations, by architecture and shape class.
- :mod:`.primitives`: device functions: positions of a split, exact products on matrix units, keys, top two.
- :mod:`.short`: up to 512 tokens, the forward and the pairs of the backward. :mod:`.long`: tiles, any length, any dtype.
- :mod:`.ops`: the operators ``fpet::bdm_forward_triton`` and ``fpet::bdm_backward_triton``.
- :mod:`.report`: what the compiler makes of the kernels for a GPU that need not be there.

docs/triton.md has the data flow.
"""
