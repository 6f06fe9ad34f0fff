/* vm.c: frames, tables and what a process finds at an address. */
#include "kernel.h"

#define FRAMES 2048
#define BLOCKS 2
#define NONE 0xffffu

static u64 pool; /* physical address of frame 0; blocks are behind the frames */
static u16 references[FRAMES], next_free[FRAMES], first_free, blocks_used;
static u64 free_frames;

void vm_begin(void)
{
    pool = (physical(__ram_free) + BLOCK_SIZE - 1) & -BLOCK_SIZE;
    for (unsigned n = 0; n < FRAMES; n++)
        next_free[n] = (u16)(n + 1 < FRAMES ? n + 1 : NONE);
    first_free = 0;
    free_frames = FRAMES;
}

u64 vm_free_frames(void) { return free_frames; }

static bool is_frame(u64 address) { return address >= pool && address < pool + FRAMES * (u64)PAGE_SIZE; }
static unsigned number_of(u64 address) { return (unsigned)((address - pool) / PAGE_SIZE); }

static u64 take_frame(void)
{
    unsigned n = first_free;

    if (n == NONE)
        panic("no frame is left", NULL);
    first_free = next_free[n];
    free_frames--;
    references[n] = 1;
    u64 *word = virtual(pool + n * (u64)PAGE_SIZE);
    for (unsigned i = 0; i < PAGE_SIZE / 8; i++)
        word[i] = 0;
    return pool + n * (u64)PAGE_SIZE;
}

static void put_frame(u64 address)
{
    unsigned n = number_of(address);

    if (--references[n])
        return;
    next_free[n] = first_free;
    first_free = (u16)n;
    free_frames++;
}

static u64 take_block(void)
{
    for (unsigned n = 0; n < BLOCKS; n++) {
        if (!(blocks_used >> n & 1)) {
            blocks_used |= (u16)(1u << n);
            return pool + FRAMES * (u64)PAGE_SIZE + n * BLOCK_SIZE;
        }
    }
    return 0;
}

static unsigned index_at(u64 address, int level) { return address >> (12 + 9 * level) & 511; }

/* The entry of `level` for an address; tables are made on the way when `make`. A block above ends the way. */
static u64 *walk(u64 root, u64 address, int level, bool make, int *found)
{
    u64 *table = virtual(root);

    for (int at = LEVELS - 1;; at--) {
        u64 *entry = &table[index_at(address, at)];
        if (found)
            *found = at;
        if (at == level || (entry_valid(*entry) && !entry_is_table(*entry, at)))
            return entry;
        if (!entry_valid(*entry)) {
            if (!make)
                return NULL;
            *entry = table_entry(take_frame());
        }
        table = virtual(entry_address(*entry));
    }
}

u64 *vm_entry(struct space *space, u64 address, int *level)
{
    u64 *entry = address < USER_END ? walk(space->root, address, 0, false, level) : NULL;

    return entry && entry_valid(*entry) ? entry : NULL;
}

/* Calls `visit` for every valid leaf of the lower half; then, when `free_tables`, gives its tables back. */
static void each_leaf(u64 root, int level, u64 base, bool free_tables, void (*visit)(u64 *, u64, int, void *), void *with)
{
    u64 *table = virtual(root);
    unsigned entries = level == LEVELS - 1 ? 256 : 512;

    for (unsigned n = 0; n < entries; n++) {
        u64 address = base + ((u64)n << (12 + 9 * level));
        if (!entry_valid(table[n]))
            continue;
        if (entry_is_table(table[n], level)) {
            each_leaf(entry_address(table[n]), level - 1, address, free_tables, visit, with);
            if (free_tables) {
                put_frame(entry_address(table[n]));
                table[n] = 0;
            }
        } else {
            visit(&table[n], address, level, with);
        }
    }
}

static void drop_leaf(u64 *entry, u64 address, int level, void *with)
{
    u64 target = entry_address(*entry);

    (void)address;
    (void)with;
    if (level == 0 && is_frame(target))
        put_frame(target);
    if (level == 1)
        blocks_used &= (u16) ~(1u << (target - pool - FRAMES * (u64)PAGE_SIZE) / BLOCK_SIZE);
    *entry = 0;
}

extern u64 kernel_root[]; /* machine-<isa>.c */

void vm_new(struct space *space, unsigned asid)
{
    u64 *root;

    space->asid = asid;
    space->root = take_frame();
    root = virtual(space->root);
    for (unsigned n = 256; n < 512; n++)
        root[n] = kernel_root[n];
    for (unsigned n = 0; n < MAX_REGIONS; n++)
        space->regions[n].kind = REGION_NONE;
}

void vm_clear(struct space *space)
{
    each_leaf(space->root, LEVELS - 1, 0, true, drop_leaf, NULL);
    for (unsigned n = 0; n < MAX_REGIONS; n++)
        space->regions[n].kind = REGION_NONE;
    flush_asid(space->asid);
}

void vm_delete(struct space *space)
{
    vm_clear(space);
    put_frame(space->root);
}

static void share_leaf(u64 *entry, u64 address, int level, void *with)
{
    struct space *child = with;
    unsigned flags = entry_flags(*entry);
    u64 target = entry_address(*entry);

    if (level == 1) /* a block is the parent's alone */
        return;
    if (!(flags & P_SHARED) && flags & P_WRITE)
        *entry = leaf_entry(target, flags & ~(unsigned)P_WRITE, 0); /* whoever writes first gets a copy */
    *walk(child->root, address, 0, true, NULL) = *entry;
    if (is_frame(target))
        references[number_of(target)]++;
}

void vm_fork(struct space *child, struct space *parent)
{
    for (unsigned n = 0; n < MAX_REGIONS; n++) {
        child->regions[n] = parent->regions[n];
        if (child->regions[n].kind == REGION_BLOCK)
            child->regions[n].kind = REGION_NONE;
    }
    each_leaf(parent->root, LEVELS - 1, 0, false, share_leaf, child);
    flush_asid(parent->asid);
}

struct region *vm_add(struct space *space, u64 start, u64 bytes, enum kind kind, unsigned rights)
{
    u64 end = (start + bytes + PAGE_SIZE - 1) & -(u64)PAGE_SIZE;
    struct region *unused = NULL;

    if (start % PAGE_SIZE || end <= start || end > USER_END)
        return NULL;
    for (unsigned n = 0; n < MAX_REGIONS; n++) {
        struct region *region = &space->regions[n];
        if (region->kind == REGION_NONE)
            unused = region;
        else if (start < region->end && region->start < end)
            return NULL;
    }
    if (unused == NULL)
        return NULL;
    if (kind == REGION_BLOCK) {
        u64 block = start % BLOCK_SIZE || end - start != BLOCK_SIZE ? 0 : take_block();
        if (block == 0)
            return NULL;
        *walk(space->root, start, 1, true, NULL) = leaf_entry(block, P_USER | P_SHARED | rights, 1);
    }
    for (u64 at = start; kind == REGION_SHARED && at < end; at += PAGE_SIZE)
        *walk(space->root, at, 0, true, NULL) = leaf_entry(take_frame(), P_USER | P_SHARED | rights, 0);
    *unused = (struct region){start, end, kind, rights, 0, 0};
    return unused;
}

bool vm_alias(struct space *space, u64 to, u64 from, unsigned rights)
{
    u64 *entry = vm_entry(space, from, NULL);
    u64 target;

    if (entry == NULL || !(entry_flags(*entry) & P_SHARED) || !vm_add(space, to, PAGE_SIZE, REGION_ZERO, rights))
        return false;
    target = entry_address(*entry);
    references[number_of(target)]++;
    *walk(space->root, to, 0, true, NULL) = leaf_entry(target, P_USER | P_SHARED | rights, 0);
    return true;
}

/* What belongs at `address`, which has no entry. */
static u64 supply(const struct region *region, u64 address)
{
    u64 offset = address - region->start;

    if (region->kind == REGION_FLASH)
        return region->source + offset;
    u64 frame = take_frame();
    if (region->kind == REGION_COPY) {
        u8 *to = virtual(frame);
        const u8 *from = virtual(region->source + offset);
        for (unsigned n = 0; n < PAGE_SIZE && offset + n < region->source_bytes; n++)
            to[n] = from[n];
    }
    return frame;
}

bool vm_fault(struct space *space, u64 address, enum event access)
{
    u64 page = address & -(u64)PAGE_SIZE;
    struct region *region = NULL;
    bool writes = access == EVENT_WRITE;
    int level;

    for (unsigned n = 0; n < MAX_REGIONS; n++) {
        struct region *at = &space->regions[n];
        if (at->kind != REGION_NONE && page >= at->start && page < at->end)
            region = at;
    }
    if (region == NULL || (writes && !(region->rights & P_WRITE)) ||
        (access == EVENT_FETCH && !(region->rights & P_EXECUTE)))
        return false;

    u64 *entry = walk(space->root, page, 0, true, &level);
    if (!entry_valid(*entry)) { /* its accessed bit is for the access to set, or to fault for once more */
        *entry = leaf_entry(supply(region, page), P_USER | region->rights, 0);
        flush_page(page, space->asid);
        return true;
    }
    unsigned flags = entry_flags(*entry);
    unsigned wanted = flags | P_ACCESSED | (writes ? P_DIRTY : 0);
    u64 target = entry_address(*entry);
    if (writes && !(flags & P_WRITE)) {
        if (references[number_of(target)] > 1) {
            u64 copy = take_frame();
            memcpy(virtual(copy), virtual(target), PAGE_SIZE);
            put_frame(target);
            target = copy;
        }
        wanted |= P_WRITE;
    }
    if (wanted == flags)
        return false;
    *entry = leaf_entry(target, wanted, level);
    flush_page(page, space->asid);
    return true;
}
