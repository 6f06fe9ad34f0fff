/*
 * processes: a small Unix on the guest's own page tables.
 *
 * The kernel turns translation on, runs the program `init` from its ELF in flash, and serves it and its children: fork
 * with copy on write, exec, wait, pipes, demand paging, shared and aliased memory, blocks of 2 MiB, a timer that takes
 * the CPU away. Programs that do what they may not are killed. What `init` returns is the guest's exit status.
 */
#include "calls.h"
#include "kernel.h"

#define MAX_PROCESSES 12
#define MAX_PIPES 4
#define PIPE_SIZE 512
#define NAME_SIZE 16

enum state { STATE_FREE, STATE_READY, STATE_ASLEEP, STATE_DEAD };

struct pipe {
    u8 bytes[PIPE_SIZE];
    u64 written, read;
    unsigned readers, writers;
};

struct file {
    struct pipe *pipe;
    bool writes;
};

struct process {
    struct trap trap; /* first: entry-<isa>.S saves registers here */
    enum state state;
    u64 pid, parent, status, wake_at, preempted;
    struct space space;
    struct file files[MAX_FILES]; /* file number - 2 */
};

struct program {
    const char *name;
    const u8 *elf;
};

extern const u8 program_init[], program_hash[], program_upper[], program_worker[];
static const struct program programs[] = {
    {"init", program_init}, {"hash", program_hash}, {"upper", program_upper}, {"worker", program_worker}};

static struct process processes[MAX_PROCESSES];
static struct pipe pipes[MAX_PIPES];
static struct process *current;
static u64 last_pid, ticks;

_Noreturn void panic(const char *why, const struct trap *trap)
{
    print("\nkernel: %s\n", why);
    if (trap)
        print("  pc %x, cause %x, address %x\n", trap->pc, trap->cause, trap->address);
    guest_exit(1);
}

/* --- Programs -------------------------------------------------------------------------------------------------- */

struct elf_header {
    u8 ident[16];
    u16 type, machine;
    u32 version;
    u64 entry, phoff, shoff;
    u32 flags;
    u16 ehsize, phentsize, phnum;
};

struct elf_segment {
    u32 type, flags;
    u64 offset, vaddr, paddr, filesz, memsz, align;
};

static bool same(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

/* Replaces what the process is by the program; false when there is none of that name, and nothing is lost. */
static bool execute(struct process *process, const char *name, u64 argument)
{
    const u8 *elf = NULL;

    for (unsigned n = 0; n < ARRAY_SIZE(programs); n++)
        if (same(programs[n].name, name))
            elf = programs[n].elf;
    if (elf == NULL)
        return false;
    const struct elf_header *header = (const void *)elf;
    const struct elf_segment *segments = (const void *)(elf + header->phoff);
    vm_clear(&process->space);
    for (unsigned n = 0; n < header->phnum; n++) {
        const struct elf_segment *segment = &segments[n];
        u64 skip = segment->vaddr % PAGE_SIZE; /* as much of the file is before it in its page */
        u64 source = physical(elf) + segment->offset - skip;
        bool writable = segment->flags & 2;
        if (segment->type != 1 || segment->memsz == 0)
            continue;
        struct region *region =
            vm_add(&process->space, segment->vaddr - skip, segment->memsz + skip,
                   writable ? REGION_COPY : REGION_FLASH, writable ? P_WRITE : P_EXECUTE);
        if (region == NULL || source % PAGE_SIZE)
            panic("a program that does not fit", NULL);
        region->source = source;
        region->source_bytes = segment->filesz + skip;
    }
    vm_add(&process->space, STACK_TOP - STACK_PAGES * PAGE_SIZE, STACK_PAGES * PAGE_SIZE, REGION_ZERO, P_WRITE);
    user_registers(&process->trap, header->entry, STACK_TOP, argument);
    return true;
}

static struct process *new_process(void)
{
    for (unsigned n = 0; n < MAX_PROCESSES; n++) {
        struct process *process = &processes[n];
        if (process->state == STATE_FREE) {
            process->pid = ++last_pid;
            process->preempted = 0;
            vm_new(&process->space, n + 1);
            return process;
        }
    }
    return NULL;
}

static void close_file(struct file *file)
{
    if (file->pipe == NULL)
        return;
    if (file->writes)
        file->pipe->writers--;
    else
        file->pipe->readers--;
    file->pipe = NULL;
}

static void die(struct process *process, u64 status)
{
    for (unsigned n = 0; n < MAX_FILES; n++)
        close_file(&process->files[n]);
    vm_clear(&process->space);
    process->status = status;
    process->state = STATE_DEAD;
    if (process->pid == 1)
        guest_exit((unsigned)status);
    for (unsigned n = 0; n < MAX_PROCESSES; n++)
        if (processes[n].parent == process->pid)
            processes[n].parent = 1;
}

/* --- System calls ---------------------------------------------------------------------------------------------- */

/* What a call answers when it has to wait: it is made again. */
#define AGAIN (FAILED - 1)

static struct file *file_of(u64 number)
{
    return number >= 2 && number < 2 + MAX_FILES && current->files[number - 2].pipe ? &current->files[number - 2] : NULL;
}

static u64 do_write(u64 number, u64 from, u64 size)
{
    struct file *file = file_of(number);
    u64 done = 0;
    u8 byte;

    if (number != 1 && (file == NULL || !file->writes || file->pipe->readers == 0))
        return FAILED;
    for (; done < size; done++) {
        struct pipe *pipe = number == 1 ? NULL : file->pipe;
        if (pipe && pipe->written - pipe->read == PIPE_SIZE)
            break;
        if (!copy_from_user(&byte, from + done, 1))
            return FAILED;
        if (pipe)
            pipe->bytes[pipe->written++ % PIPE_SIZE] = byte;
        else
            uart_putc((char)byte);
    }
    return done == 0 && size ? AGAIN : done;
}

static u64 do_read(u64 number, u64 to, u64 size)
{
    struct file *file = file_of(number);
    u64 done = 0;

    if (file == NULL || file->writes)
        return FAILED;
    for (; done < size && file->pipe->read != file->pipe->written; done++) {
        if (!copy_to_user(to + done, &file->pipe->bytes[file->pipe->read % PIPE_SIZE], 1))
            return FAILED;
        file->pipe->read++;
    }
    return done == 0 && size && file->pipe->writers ? AGAIN : done;
}

static u64 do_fork(void)
{
    struct process *child = new_process();

    if (child == NULL)
        return FAILED;
    child->trap = current->trap;
    child->parent = current->pid;
    vm_fork(&child->space, &current->space);
    for (unsigned n = 0; n < MAX_FILES; n++) {
        child->files[n] = current->files[n];
        if (child->files[n].pipe)
            *(child->files[n].writes ? &child->files[n].pipe->writers : &child->files[n].pipe->readers) += 1;
    }
    call_done(&child->trap);
    *call_argument(&child->trap, 0) = 0;
    child->state = STATE_READY;
    return child->pid;
}

static u64 do_wait(u64 pid)
{
    for (unsigned n = 0; n < MAX_PROCESSES; n++) {
        struct process *process = &processes[n];
        if (process->state == STATE_FREE || process->pid != pid || process->parent != current->pid)
            continue;
        if (process->state != STATE_DEAD)
            return AGAIN;
        vm_delete(&process->space);
        process->state = STATE_FREE;
        return process->status;
    }
    return FAILED;
}

static u64 do_pipe(u64 to)
{
    struct pipe *pipe = NULL;
    u32 numbers[2];
    unsigned found = 0;

    for (unsigned n = 0; n < MAX_PIPES; n++)
        if (pipes[n].readers + pipes[n].writers == 0)
            pipe = &pipes[n];
    for (unsigned n = 0; n < MAX_FILES && found < 2; n++)
        if (current->files[n].pipe == NULL)
            numbers[found++] = n + 2;
    if (pipe == NULL || found < 2 || !copy_to_user(to, numbers, sizeof(numbers)))
        return FAILED;
    pipe->written = pipe->read = 0;
    pipe->readers = pipe->writers = 1;
    current->files[numbers[0] - 2] = (struct file){pipe, false};
    current->files[numbers[1] - 2] = (struct file){pipe, true};
    return 0;
}

static u64 do_map(u64 address, u64 bytes, u64 kind)
{
    static const enum kind kinds[] = {REGION_ZERO, REGION_SHARED, REGION_BLOCK};

    return kind < ARRAY_SIZE(kinds) && vm_add(&current->space, address, bytes, kinds[kind], P_WRITE) ? 0 : FAILED;
}

static u64 do_entry(u64 address)
{
    int level;
    u64 *entry = vm_entry(&current->space, address, &level);

    return entry ? (entry_flags(*entry) & (P_WRITE | P_EXECUTE | P_ACCESSED | P_DIRTY | P_SHARED)) | (u64)level << 8 | 1ul << 16
                 : 0;
}

static u64 do_age(u64 address)
{
    int level;
    u64 *entry = vm_entry(&current->space, address, &level);

    if (entry == NULL)
        return FAILED;
    *entry = leaf_entry(entry_address(*entry), entry_flags(*entry) & ~(unsigned)(P_ACCESSED | P_DIRTY), level);
    flush_page(address & -(u64)PAGE_SIZE, current->space.asid);
    return 0;
}

static u64 do_exec(u64 name, u64 argument)
{
    char text[NAME_SIZE];

    for (unsigned n = 0; n < NAME_SIZE; n++) {
        if (!copy_from_user(&text[n], name + n, 1))
            return FAILED;
        if (text[n] == 0)
            return execute(current, text, argument) ? AGAIN : FAILED; /* nothing is to be answered */
    }
    return FAILED;
}

static void give_way(void);

static void system_call(struct trap *trap)
{
    u64 number = call_number(trap), answer = FAILED;
    u64 a = *call_argument(trap, 0), b = *call_argument(trap, 1), c = *call_argument(trap, 2);
    struct file *file;

    switch (number) {
    case CALL_EXIT: die(current, a & 0x7f); give_way(); return;
    case CALL_WRITE: answer = do_write(a, b, c); break;
    case CALL_READ: answer = do_read(a, b, c); break;
    case CALL_FORK: answer = do_fork(); break;
    case CALL_EXEC:
        answer = do_exec(a, b);
        if (answer == AGAIN)
            return;
        break;
    case CALL_WAIT: answer = do_wait(a); break;
    case CALL_PIPE: answer = do_pipe(a); break;
    case CALL_CLOSE:
        file = file_of(a);
        if (file)
            close_file(file), answer = 0;
        break;
    case CALL_MAP: answer = do_map(a, b, c); break;
    case CALL_ALIAS: answer = vm_alias(&current->space, a, b, c ? P_EXECUTE : P_WRITE) ? 0 : FAILED; break;
    case CALL_ENTRY: answer = do_entry(a); break;
    case CALL_AGE: answer = do_age(a); break;
    case CALL_YIELD: answer = 0; break;
    case CALL_SLEEP:
        current->wake_at = ticks + a;
        current->state = STATE_ASLEEP;
        answer = 0;
        break;
    case CALL_FRAMES: answer = vm_free_frames(); break;
    case CALL_PREEMPTED: answer = current->preempted; break;
    case CALL_KEPT_OUT: answer = kernel_is_kept_out(a); break;
    }
    if (answer == AGAIN) {
        call_again(trap);
    } else {
        call_done(trap);
        *call_argument(trap, 0) = answer;
    }
    if (answer == AGAIN || number == CALL_YIELD || number == CALL_SLEEP)
        give_way();
}

/* --- Who runs -------------------------------------------------------------------------------------------------- */

static void tick(void)
{
    timer_acknowledge();
    ticks++;
    for (unsigned n = 0; n < MAX_PROCESSES; n++)
        if (processes[n].state == STATE_ASLEEP && processes[n].wake_at <= ticks)
            processes[n].state = STATE_READY;
}

/* The next process, in turn, that can go on. */
static void give_way(void)
{
    unsigned from = current ? (unsigned)(current - processes) : 0;

    for (;;) {
        for (unsigned n = 1; n <= MAX_PROCESSES; n++) {
            struct process *next = &processes[(from + n) % MAX_PROCESSES];
            if (next->state == STATE_READY) {
                if (next != current)
                    use_tables(next->space.root, next->space.asid);
                current = next;
                return;
            }
        }
        wait_for_timer();
        tick();
    }
}

/* From entry-<isa>.S: a trap of the current process. Returns who runs next, by its registers. */
struct trap *trap_of_user(struct trap *trap, bool is_interrupt)
{
    static const u8 killed[] = {
        [EVENT_READ] = KILLED_READ, [EVENT_WRITE] = KILLED_WRITE, [EVENT_FETCH] = KILLED_FETCH,
        [EVENT_UNDEFINED] = KILLED_UNDEFINED,
    };
    enum event event = event_of(trap, is_interrupt);

    if (event == EVENT_TIMER) {
        tick();
        current->preempted++;
        give_way();
    } else if (event == EVENT_CALL) {
        system_call(trap);
    } else if (event == EVENT_UNDEFINED || event == EVENT_OTHER || !vm_fault(&current->space, trap->address, event)) {
        if (event == EVENT_OTHER)
            panic("a trap that means nothing", trap);
        die(current, killed[event]);
        give_way();
    }
    return &current->trap;
}

/* From entry-<isa>.S: a trap in the kernel. True when the access is to be made again. */
bool trap_of_kernel(struct trap *trap, bool copies)
{
    enum event event = event_of(trap, false);

    if (!copies || (event != EVENT_READ && event != EVENT_WRITE))
        panic("a trap in the kernel", trap);
    return trap->address < USER_END && vm_fault(&current->space, trap->address, event);
}

_Noreturn void return_to_user(struct trap *trap);

int main(void)
{
    print("processes (%s)\n", isa_name);
    leave_boot_tables();
    vm_begin();
    struct process *init = new_process();
    if (!execute(init, "init", 0))
        panic("no init", NULL);
    init->state = STATE_READY;
    timer_start();
    give_way();
    return_to_user(&current->trap);
}
