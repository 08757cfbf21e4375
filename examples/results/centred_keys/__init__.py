"""A fairseq `--user-dir`: ea_fairseq, except that a decoder's convolution is centred on the key.

The window of its self-attention then reaches one key to the left and one to the right, as that of
encoder-decoder attention does, in place of two to the left. Keys of the future count as zeros.
"""

import ea_fairseq  # noqa: F401 (registers the models)
from ea_fairseq.modules import transformer_layer

transformer_layer.WINDOWS["decoder"] = transformer_layer.WINDOWS["cross"]
