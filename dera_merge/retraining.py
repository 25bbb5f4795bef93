"""The retraining study by the name that people import it by; it lives in `measuring/`."""

from .measuring.retraining import agreement, optimum, per_token, regret

__all__ = ["agreement", "optimum", "per_token", "regret"]
