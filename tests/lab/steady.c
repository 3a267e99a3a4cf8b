/* Keeps two idle KVM VMs for as long as the outer system runs: one whose vCPU has its APIC in the kernel (and off), one
 * whose vCPU has none.
 *
 * The kernel patches its scheduler and KVM when the first such VM comes and when the last one goes, while the other
 * processor runs just that code. Processors that emulate one another's instructions do not always bear it: now and then
 * one still runs into a breakpoint that is gone already, and the kernel panics. */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <unistd.h>

static int keep(int kvm, int with_chips) {
    int vm = ioctl(kvm, KVM_CREATE_VM, 0);
    return vm >= 0 && (!with_chips || ioctl(vm, KVM_CREATE_IRQCHIP, 0) == 0) && ioctl(vm, KVM_CREATE_VCPU, 0) >= 0;
}

int main(void) {
    int kvm = open("/dev/kvm", O_RDWR);
    if (kvm < 0 || !keep(kvm, 0) || !keep(kvm, 1)) {
        perror("lab: the kernel will patch itself");
        return 1;
    }
    if (daemon(0, 0)) return 1;
    for (;;) pause();
}
