"""What a person types: one command a file, or a folder where it takes more than one."""
