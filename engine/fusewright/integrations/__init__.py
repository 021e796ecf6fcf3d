"""Our kernels inside models that were written without them."""

from fusewright.integrations import dtensor, huggingface
from fusewright.integrations.import_hooks import when_imported
from fusewright.integrations.patch import patch, unpatch
from fusewright.integrations.switch import disable, enable, enabled

__all__ = ["disable", "enable", "enabled", "patch", "unpatch"]

# Both only add to a registry of the library's own.
when_imported(huggingface.REGISTRY, huggingface.register)
when_imported(dtensor.REGISTRY, dtensor.register)
