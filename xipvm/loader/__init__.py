"""Guest images: reading ELF files and placing them in flash and RAM."""
