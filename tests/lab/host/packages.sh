# Debian packages for the lab: fetched once into a cache of the lab's own, checked whenever they are unpacked. Nothing is
# installed and the host's apt is left as it is: the configuration, package lists and cache used here are the lab's.
# shellcheck shell=bash

# Debian's release that has all packages, with its backports, whatever the host runs.
release=bookworm
# What is fetched: a set a line, of packages. `kernel:V` stands for the image that linux-image-cloud-amd64 of version V
# depends on. The libraries with stress-ng are its own, but for those that images.sh makes stubs of. QEMU is the one of
# the backports: in the emulation of 7.2, every third boot of Linux 6.12 ends in a double fault.
package_sets=(
  "linux-6.1 kernel:6.1"
  "linux-6.12 kernel:6.12"
  "tools busybox-static cpio stress-ng libc6 libapparmor1 libbsd0 libmd0 libcrypt1 libjpeg62-turbo libjudydebian1 libsctp1
   libxxhash0 zlib1g"
  "qemu qemu-system-x86/$release-backports qemu-system-common/$release-backports qemu-system-data/$release-backports
   seabios/$release-backports libaio1 libblkid1 libbpf1 libc6 libcapstone4 libdaxctl1 libelf1 libfdt1 libffi8 libfuse3-3
   libgcc-s1 libglib2.0-0 libgmp10 libgnutls30 libhogweed6 libibverbs1 libidn2-0 libjpeg62-turbo libkmod2 liblzma5 libmount1
   libndctl6 libnettle8 libnl-3-200 libnl-route-3-200 libnuma1 libp11-kit0 libpcre2-8-0 libpixman-1-0 libpmem1
   libpng16-16 librdmacm1 libsasl2-2 libseccomp2 libselinux1 libslirp0 libssl3 libtasn1-6 libudev1 libunistring2
   liburing2 libuuid1 libvdeplug2 libzstd1 zlib1g"
)

# The host's own mirrors of Debian, `MIRROR SECURITY-MIRROR`; the second may be empty. A host of another distribution
# names one in OFFSHOOT_LAB_MIRROR.
mirrors() {
  if [ -n "${OFFSHOOT_LAB_MIRROR:-}" ]; then
    echo "$OFFSHOOT_LAB_MIRROR"
    return
  fi
  local id codename
  id=$(. /etc/os-release && echo "${ID:-}")
  codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
  [ "$id" = debian ] || return 1
  apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' | awk -v codename="$codename" '
    $3 == "main" && $2 == codename && !main { main = $1 }
    $3 == "main" && $2 == codename "-security" && !security { security = $1 }
    END { if (!main) exit 1; print main, security }'
}

# Writes the lab's apt configuration: the host's settings (a proxy, credentials: read where they are, not copied), its
# own sources, lists and cache, and none of the host's hooks, which would act on the host.
configure_apt() {
  local found mirror security options=""
  found=$(mirrors) || skip_lab "no Debian mirror known here: name one in OFFSHOOT_LAB_MIRROR (and install debian-archive-keyring)"
  read -r mirror security <<<"$found"
  mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
  if [ -e /usr/share/keyrings/debian-archive-keyring.gpg ]; then
    options="[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] "
  fi
  {
    echo "deb $options$mirror $release main"
    echo "deb $options$mirror $release-backports main"
    [ -z "$security" ] || echo "deb $options$security $release-security main"
  } >"$apt/sources.list"
  {
    [ ! -e /etc/apt/apt.conf ] || echo '#include "/etc/apt/apt.conf";'
    echo '#clear APT::Update;'
    echo '#clear DPkg;'
  } >"$apt/main.conf"
  cat >"$apt/first.conf" <<CONF
Dir::Etc::main "$apt/main.conf";
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State::lists "$apt/lists";
Dir::Cache "$apt/cache";
APT::Architecture "amd64";
APT::Sandbox::User "root";
CONF
}

lab_apt() { # lab_apt get|cache ARGUMENT…
  local tool=$1
  shift
  APT_CONFIG="$apt/first.conf" "apt-$tool" "$@"
}

# The package that the newest linux-image-cloud-amd64 of this version is.
kernel_package() {
  lab_apt cache show linux-image-cloud-amd64 | awk -v version="$1." '
    $1 == "Version:" { wanted = index($2, version) == 1 }
    $1 == "Depends:" && wanted { print $2; exit }'
}

# Fetches the sets that are not there. Each leaves a list of its files with their checksums, as apt verified them
# against the signed index.
fetch_packages() {
  local set name package kernel updated= packages
  for set in "${package_sets[@]}"; do
    read -r name packages <<<"${set//$'\n'/ }"
    # A set that has changed is another one.
    if [ -s "$debs/$name.sha256" ] && [ -e "$debs/$name.set" ] && [ "$(cat "$debs/$name.set")" = "$set" ]; then continue; fi
    if [ -z "$updated" ]; then
      echo "lab: fetching Debian packages" >&2
      configure_apt
      lab_apt get update -qq >&2 || skip_lab "no package lists: \`apt-get update\` failed for $release and $release-backports"
      updated=yes
    fi
    rm -rf "${debs:?}/$name" "$debs/$name.sha256" && mkdir -p "$debs/$name"
    kernel=
    case $packages in
      kernel:*)
        kernel=${packages#kernel:}
        packages=$(kernel_package "${kernel%% *}")
        [ -n "$packages" ] || skip_lab "no linux-image-cloud-amd64 ${kernel%% *} in $release or $release-backports"
        ;;
    esac
    echo "$set" >"$debs/$name.set"
    # shellcheck disable=SC2086  # a list
    (cd "$debs/$name" && lab_apt get download -qq $packages >&2) || skip_lab "packages not to be had: $packages"
    (cd "$debs" && sha256sum "$name"/*.deb) >"$debs/$name.new" && mv "$debs/$name.new" "$debs/$name.sha256"
  done
}

# unpack SET DIRECTORY: after checking that the files are still what was fetched.
unpack() {
  (cd "$debs" && sha256sum --quiet --check "$1.sha256" >&2) ||
    die "cached packages of $1 are not what was fetched: remove $debs/$1.sha256 to fetch them again"
  local deb
  mkdir -p "$2"
  for deb in "$debs/$1"/*.deb; do dpkg-deb -x "$deb" "$2"; done
}
