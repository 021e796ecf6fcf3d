"""Our kernels inside models that were written without them."""

from fusewright.integrations.patch import patch, unpatch
from fusewright.integrations.switch import disable, enable, enabled

__all__ = ["disable", "enable", "enabled", "patch", "unpatch"]
