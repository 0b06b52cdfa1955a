"""Methods that make a trained network smaller. Each is one file with `Options`, its block in params.yaml, and
`create(options)`, its hook for training."""
