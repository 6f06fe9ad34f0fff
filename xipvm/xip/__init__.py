"""XIP files: files on memory that the CPU can address, read, written, mapped and truncated without a page cache.

A file system hands out blocks of a memory device by ``get_xip_mem`` (inode.py); filemap.py makes files of them as
mm/filemap_xip.c did in 2008, dax.py as DAX does today. Facts about both: docs/xip.md.
"""
