"""Several processes of one run: who may measure, who holds a folder, how all of them end."""
