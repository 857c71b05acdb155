"""The network: embedding -> corruption -> denoiser -> reconstruction and click heads, and difficulty."""
