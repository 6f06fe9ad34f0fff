/* programs.S: the programs' ELFs as they are, each on a page of flash. PROGRAMS names the folder they were built in. */
    .macro program name
    .balign 4096
    .global program_\name
program_\name:
    .incbin "\name"
    .endm

    .section .programs, "a"
    program init
    program hash
    program upper
    program worker
