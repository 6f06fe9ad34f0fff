"""ext2, the file system that used filemap_xip: images made by mke2fs, with blocks of 4 KiB.

layout.py has what is on the disk, volume.py the image with its bitmaps, inode.py files, directory.py names.
"""
