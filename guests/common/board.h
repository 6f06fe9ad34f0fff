/* board.h: physical addresses of the two boards, QEMU's `virt` of either ISA. Flash banks are two x16 chips side by
 * side on a 32-bit bus: what a guest sees as one 256 KiB sector is 128 KiB of each chip. */
#ifndef BOARD_H
#define BOARD_H

#define FLASH_SECTOR 0x40000ul

#if defined(__aarch64__)

#define FLASH_BANK0 0x00000000ul
#define FLASH_BANK1 0x04000000ul
#define UART_BASE 0x09000000ul /* PL011 */
#define GICD_BASE 0x08000000ul /* GICv2 distributor */
#define GICC_BASE 0x08010000ul /* GICv2 CPU interface */
#define RAM_BASE 0x40000000ul
#define NOWHERE 0x0b000000ul /* no device and no memory decodes this */

#elif defined(__riscv)

#define FLASH_BANK0 0x20000000ul
#define FLASH_BANK1 0x22000000ul
#define UART_BASE 0x10000000ul /* NS16550A */
#define CLINT_BASE 0x02000000ul
#define FINISHER_BASE 0x00100000ul /* SiFive test finisher */
#define RAM_BASE 0x80000000ul
#define NOWHERE 0x18000000ul /* no device and no memory decodes this */

#else
#error "no board for this ISA"
#endif

#endif
