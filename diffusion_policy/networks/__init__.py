"""Networks that predict noise, and encoders of what conditions them."""
