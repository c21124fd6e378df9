"""The trained model and the held-out text of `fxquant demo`; installed as `fxquant.demo_data`."""
