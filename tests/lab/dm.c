/* dm NAME: makes a device-mapper device, or gives it a new table, which is read from standard input: lines of
 * `FIRST COUNT TARGET [ARGUMENTS]`, in sectors, as dmsetup(8) reads them. Prints the device's path. */
#include <fcntl.h>
#include <linux/dm-ioctl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/sysmacros.h>

enum { ROOM = 4096 };

static struct dm_ioctl *request(char *room, const char *name) {
    struct dm_ioctl *io = memset(room, 0, ROOM);
    io->version[0] = DM_VERSION_MAJOR;
    io->data_size = ROOM;
    io->data_start = sizeof *io;
    strncpy(io->name, name, sizeof io->name - 1);
    return io;
}

int main(int count, char **arguments) {
    static char room[ROOM];
    int control = open("/dev/mapper/control", O_RDWR);
    if (count != 2 || control < 0) {
        perror("dm: /dev/mapper/control");
        return 1;
    }
    struct dm_ioctl *io = request(room, arguments[1]);
    if (ioctl(control, DM_DEV_STATUS, io)) {
        io = request(room, arguments[1]);
        if (ioctl(control, DM_DEV_CREATE, io)) return perror("dm: create"), 1;
    }
    io = request(room, arguments[1]);
    char line[256], target[DM_MAX_TYPE_NAME], *at = room + io->data_start;
    while (fgets(line, sizeof line, stdin)) {
        struct dm_target_spec *spec = (void *)at;
        unsigned long long first, sectors;
        int used = 0;
        if (sscanf(line, "%llu %llu %15s %n", &first, &sectors, target, &used) != 3) return fprintf(stderr, "dm: %s", line), 1;
        char *parameters = at + sizeof *spec;
        spec->sector_start = first;
        spec->length = sectors;
        strcpy(spec->target_type, target);
        line[strcspn(line, "\n")] = 0;
        strcpy(parameters, line + used);
        /* Each begins on a multiple of 8. */
        size_t length = sizeof *spec + ((strlen(parameters) + 8) & ~(size_t)7);
        spec->next = length;
        at += length;
        io->target_count++;
        if (at > room + ROOM - 512) return fprintf(stderr, "dm: too long a table\n"), 1;
    }
    if (ioctl(control, DM_TABLE_LOAD, io)) return perror("dm: load"), 1;
    io = request(room, arguments[1]);
    /* Not suspended any more: it goes on, with the new table. */
    if (ioctl(control, DM_DEV_SUSPEND, io)) return perror("dm: resume"), 1;
    printf("/dev/dm-%u\n", minor(io->dev));
    return 0;
}
