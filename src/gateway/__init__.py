"""The AIConexus gateway: the signaling server, never in the data plane."""
