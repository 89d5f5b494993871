"""Weights to and from other libraries, as ``state_dict``s: nothing of theirs is imported.

`hubert_fast.interop.transformers`: transformers' ``HubertModel``. torchaudio's ``state_dict``s need no conversion.
"""
