"""What commands do that is more than a call of the library; imported when the command is called."""
