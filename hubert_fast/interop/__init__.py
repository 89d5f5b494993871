"""Models and weights of other libraries.

`hubert_fast.interop.transformers`: weights to and from transformers' ``HubertModel``, as ``state_dict``s. torchaudio's need no
conversion. `hubert_fast.interop.acceleration`: live models of both, on the fused operators.
"""
