"""The Hugging Face classes that load a folded checkpoint. Importing this package registers them.

The two files beside this one are copied into every folded checkpoint and stand on their own there.
"""
