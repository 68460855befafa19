"""Where GPTQModel is installed, transformers imports torchao at once, which says on standard error that it has no
libraries for this GPU, and makes torch warn of its own calls. Nothing here needs those, so they are not said.
"""

import logging

for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
