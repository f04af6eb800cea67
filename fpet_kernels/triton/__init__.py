"""The Triton backend. Importing this package imports nothing; :mod:`.ops` is imported when the backend is first asked for.

- :mod:`.configs`: frozen launch configurations, by architecture and shape class.
- :mod:`.primitives`: device functions: positions of a split, exact products, top two. :mod:`.keys`: those of the key path.
- :mod:`.short`: the forward of up to 512 tokens, in one launch. :mod:`.long`: of any length and dtype, in tiles.
- :mod:`.backward`: of any length and dtype.
- :mod:`.ops`: the operators ``fpet::bdm_forward_triton`` and ``fpet::bdm_backward_triton``.
- :mod:`.report`: what the compiler makes of the kernels for a GPU that need not be there.

docs/triton.md has the data flow, docs/triton_design.md what was tried.
"""
