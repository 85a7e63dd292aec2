"""Networks: plain nn.Modules, called as `network(x, condition)`. They know no loss and draw no samples.

Those that know the time of a process are called as `network(x, t, condition)`.

Every network is built as `Network(in_shape, out_shape, ..., condition_dim=K)`: the model fills in the shapes from the
`DataSpec`, the YAML the rest.
"""
