"""How clients reach us: one protocol a file."""
