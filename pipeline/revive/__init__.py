"""Methods that put idle weights of a trained network back to work. Each is one file with `Options`, its block in params.yaml,
and `create(options)`, its hook for training."""
