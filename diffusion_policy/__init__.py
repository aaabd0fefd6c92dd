"""Learn multimodal robot behaviour from demonstrations with diffusion policies, and measure success per mode.

Importing the package imports nothing else: take what is needed from its modules (`diffusion_policy.policy`, ...).
"""

__version__ = "0.1.0"
