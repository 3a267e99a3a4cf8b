# What the machines boot: the outer system (parts of an initramfs, not compressed, one after the other as the kernel
# takes them) and the inner initrd. Each is made again when something it is made of has changed, and only then.
# shellcheck shell=bash

kernels=(6.1 6.12)
# In the order in which they load. Of a module that a kernel has built in there is no file, which is fine.
outer_modules="irqbypass kvm kvm-amd loop dm-mod"
inner_modules="virtio_ring virtio virtio_mmio rng-core virtio-rng virtio_balloon virtio_blk failover net_failover
  virtio_net vsock vmw_vsock_virtio_transport_common vmw_vsock_virtio_transport libnvdimm nd_virtio virtio_pmem"
# What lies beside the kernels, of which the agent's initial RAM disk takes what it needs.
beside_modules="$inner_modules button evdev"
# Libraries that stress-ng names and that its memory and CPU stressors do not use, 18 MB with what they need in turn:
# stubs, whose functions abort.
stubbed="libEGL.so.1 libGLESv2.so.2 libgbm.so.1 libIPSec_MB.so.1 libkmod.so.2"

# pack DIRECTORY: a cpio archive of it, everything root's, no times that differ.
pack() {
  (cd "$1" && find . -mindepth 1 | LC_ALL=C sort | "$programs/run" cpio --quiet --reproducible -o -H newc -R 0:0)
}

# modules RELEASE-TREE DESTINATION NAMES: the named modules of a kernel, with `order`, in which they load.
modules() {
  local tree=$1 to=$2 name file
  mkdir -p "$to"
  : >"$to/order"
  for name in $3; do
    file=$(find "$tree" -name "$name.ko*" -print -quit)
    [ -n "$file" ] || continue
    case $file in
      *.xz) "$programs/busybox" unxz -c "$file" >"$to/$name.ko" ;;
      *) cp "$file" "$to/$name.ko" ;;
    esac
    echo "$name.ko" >>"$to/order"
  done
}

# package_modules RELEASE-TREE DESTINATION NAMES: the named modules of a kernel as and where its package has them.
package_modules() {
  local name
  mkdir -p "$2"
  for name in $3; do (cd "$1" && find . -name "$name.ko*" -exec cp --parents {} "$2" \;); done
}

# host_programs WORK DIRECTORY: Debian's QEMU and cpio with their libraries and firmware in one directory, where `run NAME
# ARGUMENT…` starts them on any host, installed nowhere.
host_programs() {
  local file
  mkdir -p "$2"
  cp "$1/tools/bin/busybox" "$1/tools/bin/cpio" "$1/qemu/usr/bin/qemu-system-x86_64" "$2/"
  for file in "$1"/qemu/{,usr/}lib/x86_64-linux-gnu/*.so*; do cp -L "$file" "$2/"; done
  for file in bios-256k.bin bios-microvm.bin linuxboot_dma.bin pvh.bin kvmvapic.bin; do
    find "$1/qemu/usr/share" -name $file -exec cp {} "$2/" \;
  done
  cat >"$2/run" <<'RUN'
#!/bin/sh
here=${0%/*} name=$1
shift
exec "$here/ld-linux-x86-64.so.2" --library-path "$here" "$here/$name" "$@"
RUN
  chmod +x "$2/run"
}

# busybox TREE ROOT: the program and a link for each of its tools.
busybox() {
  local tool
  mkdir -p "$2/bin" "$2/sbin" "$2/usr/bin" "$2/usr/sbin" "$2"/{proc,sys,dev,tmp,run,etc,root}
  cp "$1/bin/busybox" "$2/bin/busybox"
  for tool in $("$2/bin/busybox" --list | grep -vx busybox); do ln -sf busybox "$2/bin/$tool"; done
}

# libraries ROOT PROGRAM…: copies the shared libraries of programs of this host.
libraries() {
  local root=$1 library
  shift
  ldd "$@" | grep -oE '/[^ ]+' | grep -v ':$' | sort -u | while read -r library; do
    mkdir -p "$root${library%/*}"
    cp -Ln "$library" "$root$library"
  done
}

# stubs PROGRAM DIRECTORY: the stubbed libraries, with every symbol that the program could want of them.
stubs() {
  local source=$2/stubs.c versions=$2/stubs.map library
  {
    echo '#include <stdlib.h>'
    nm -D --undefined-only "$1" | awk '$1 == "U" && ($2 !~ /@/ || $2 ~ /@LIBKMOD/) { sub(/@.*/, "", $2); print $2 }' |
      while read -r symbol; do echo "void $symbol(void) { abort(); }"; done
  } >"$source"
  echo 'LIBKMOD_5 { global: kmod_*; };' >"$versions"
  for library in $stubbed; do
    if [ "$library" = libkmod.so.2 ]; then
      gcc -shared -fPIC -w -fno-builtin -s -Wl,-soname,"$library",--version-script,"$versions" -o "$2/$library" "$source"
    else
      gcc -shared -fPIC -w -fno-builtin -s -Wl,-soname,"$library" -o "$2/$library" "$source"
    fi
  done
  rm "$source" "$versions"
}

# inner_initrd WORK OUTPUT
inner_initrd() {
  local work=$1 root=$1/inner tools=$1/tools lib=/usr/lib/x86_64-linux-gnu version release file
  busybox "$tools" "$root"
  cp "$lab/inner/init" "$root/init"
  gcc -static -O2 -s -pthread -Wall -Werror -o "$root/bin/stamp" "$lab/stamp.c"
  cp "$tools/usr/bin/stress-ng" "$root/usr/bin/"
  mkdir -p "$root$lib" "$root/lib64"
  ln -s "..$lib" "$root/lib/x86_64-linux-gnu" 2>/dev/null || { mkdir -p "$root/lib" && ln -s "..$lib" "$root/lib/x86_64-linux-gnu"; }
  stubs "$tools/usr/bin/stress-ng" "$root$lib"
  # What is left of its needs, and of theirs: in one pass, as the package sets hold nothing else that is a library.
  find "$tools/lib" "$tools/usr/lib" -name '*.so*' | while read -r file; do
    case ${file##*/} in
      libc.so.6 | libm.so.6 | libapparmor.so.* | libbsd.so.* | libmd.so.* | libcrypt.so.* | libjpeg.so.* | libJudy.so.* | libsctp.so.* | libxxhash.so.* | libz.so.*)
        cp -a "$file" "$root$lib/"
        ;;
    esac
  done
  cp -L "$tools/lib64/ld-linux-x86-64.so.2" "$root/lib64/" 2>/dev/null ||
    cp -L "$tools/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2" "$root/lib64/"
  for version in "${kernels[@]}"; do
    release=$(ls "$work/linux-$version/lib/modules")
    modules "$work/linux-$version/lib/modules/$release" "$root/lib/modules/$release" "$inner_modules"
  done
  pack "$root" | gzip -6 -n >"$2"
}

# What does not depend on this repository's programs. Sets `images`, the directory, and `programs`, the one in it with QEMU.
build_images() {
  local key
  key=$(cat "$lab/host/images.sh" "$lab/outer/init" "$lab/inner/init" "$lab"/*.c "$debs"/{linux-6.1,linux-6.12,tools,qemu}.sha256 | sha256sum | cut -c 1-16)
  images=$cache/images/$key
  programs=$images/programs
  # Touched, so that one in use is not taken for an old one.
  [ -d "$images" ] && touch "$images" && return
  echo "lab: building images" >&2
  (set -e && make_images) || die "the images cannot be built"
}

make_images() {
  local work version release root
  work=$(mktemp -d "$cache/work.XXXXXX")
  trap "rm -rf '$work'" EXIT
  unpack tools "$work/tools"
  unpack qemu "$work/qemu"
  programs=$work/out/programs
  host_programs "$work" "$programs"
  for version in "${kernels[@]}"; do
    unpack "linux-$version" "$work/linux-$version"
    cp "$work/linux-$version"/boot/vmlinuz-* "$work/out/vmlinuz-$version"
    release=$(ls "$work/linux-$version/lib/modules")
    modules "$work/linux-$version/lib/modules/$release" "$work/modules-$version/lib/modules/$release" "$outer_modules"
    pack "$work/modules-$version" >"$work/out/modules-$version.cpio"
  done
  inner_initrd "$work" "$work/out/initrd.gz"
  root=$work/outer
  busybox "$work/tools" "$root"
  cp "$lab/outer/init" "$root/init"
  gcc -static -O2 -s -Wall -Werror -o "$root/bin/dm" "$lab/dm.c"
  for version in "${kernels[@]}"; do
    mkdir -p "$root/kernels/$version"
    cp "$work/out/vmlinuz-$version" "$root/kernels/$version/vmlinuz"
    release=$(ls "$work/linux-$version/lib/modules")
    package_modules "$work/linux-$version/lib/modules/$release" "$root/kernels/$version/lib/modules/$release" "$beside_modules"
  done
  cp "$work/out/initrd.gz" "$root/initrd.gz"
  pack "$root" >"$work/out/common.cpio"
  find "$cache/images" -mindepth 1 -maxdepth 1 -mmin +60 -exec rm -rf {} + 2>/dev/null
  mkdir -p "$cache/images"
  mv "$work/out" "$images"
  rm -rf "$work"
}

# The `offshoot` binary: built unless OFFSHOOT_BIN names one. Sets `offshoot`.
build_offshoot() {
  offshoot=${OFFSHOOT_BIN:-}
  if [ -z "$offshoot" ]; then
    (cd "$repository" && cargo build --release --quiet -p vmm >&2) || die "offshoot does not build"
    offshoot=$(cd "$repository" && cargo metadata --no-deps --format-version 1 | grep -oE '"target_directory":"[^"]*"' | cut -d '"' -f 4)/release/offshoot
  fi
  [ -x "$offshoot" ] || die "no offshoot at $offshoot"
}

# part NAME KEY BUILDER: makes NAME.cpio by `BUILDER ROOT` and keeps it while the key is the same. Sets `part`.
part() {
  part=$cache/parts/$1-$2.cpio
  [ -e "$part" ] && return
  local root
  root=$(mktemp -d "$cache/work.XXXXXX")
  on_exit "rm -rf '$root'"
  "$3" "$root"
  mkdir -p "$cache/parts"
  find "$cache/parts" -name "$1-*" -mmin +60 -delete
  pack "$root" >"$part.new" && mv "$part.new" "$part"
  rm -rf "$root"
}

offshoot_part() {
  mkdir -p "$1/bin"
  cp "$offshoot" "$1/bin/offshoot"
  # Names of functions stay, for backtraces; lines are 20 MB.
  strip --strip-debug "$1/bin/offshoot"
  libraries "$1" "$offshoot"
}

# QEMU inside, for reference measurements.
qemu_part() {
  mkdir -p "$1/bin" "$1/qemu"
  cp "$programs"/* "$1/qemu/"
  printf '#!/bin/sh
exec /qemu/run qemu-system-x86_64 -L /qemu "$@"
' >"$1/bin/qemu-system-x86_64"
  chmod +x "$1/bin/qemu-system-x86_64"
}
