/* print.c: formatted output on the console. */
#include <stdarg.h>

#include "guest.h"

static void put_padded(const char *text, int length, int width, char pad)
{
    for (; width > length; width--)
        uart_putc(pad);
    while (length--)
        uart_putc(*text++);
}

static void put_number(u64 value, unsigned base, bool negative, int width, char pad)
{
    char text[24];
    char *end = text + sizeof(text);
    char *digit = end;

    do {
        *--digit = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    if (negative)
        *--digit = '-';
    put_padded(digit, (int)(end - digit), width, pad);
}

void print(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    for (; *format; format++) {
        if (*format != '%') {
            if (*format == '\n')
                uart_putc('\r');
            uart_putc(*format);
            continue;
        }
        format++;
        char pad = *format == '0' ? '0' : ' ';
        int width = 0;
        for (; *format >= '0' && *format <= '9'; format++)
            width = width * 10 + (*format - '0');

        if (*format == 's') {
            const char *text = va_arg(args, const char *);
            int length = 0;
            while (text[length])
                length++;
            put_padded(text, length, width, pad);
        } else if (*format == 'u') {
            put_number(va_arg(args, u64), 10, false, width, pad);
        } else if (*format == 'x') {
            put_number(va_arg(args, u64), 16, false, width, pad);
        } else if (*format == 'd') {
            int64_t value = va_arg(args, int64_t);
            put_number(value < 0 ? -(u64)value : (u64)value, 10, value < 0, width, pad);
        } else if (*format == 'c') {
            uart_putc((char)va_arg(args, int));
        } else {
            uart_putc(*format);
        }
    }
    va_end(args);
}
