"""Loading models: one path, and its checks, for every command that is given one."""
