//! Telling who started the server, as systemd wants to be told: a datagram to the socket in `NOTIFY_SOCKET`.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Says so, to who wants to hear it. The server serves all the same if nobody does.
pub fn notify(state: &str) {
    let Some(path) = env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()) else { return };
    if let Err(e) = send(&path, state) {
        log::warn!("NOTIFY_SOCKET {}: {e}", path.display());
    }
}

fn send(path: &OsStr, state: &str) -> io::Result<()> {
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(path)?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_with_and_without_a_path_are_told() {
        let name = format!("offshoot-notify-{}", std::process::id());
        let path = env::temp_dir().join(&name);
        let hears = |socket: UnixDatagram| {
            let mut heard = [0; 64];
            let count = socket.recv(&mut heard).unwrap();
            String::from_utf8_lossy(&heard[..count]).into_owned()
        };
        let named = UnixDatagram::bind(&path).unwrap();
        send(path.as_os_str(), "READY=1").unwrap();
        assert_eq!(hears(named), "READY=1");
        std::fs::remove_file(&path).unwrap();
        let abstract_name = SocketAddr::from_abstract_name(name.as_bytes()).unwrap();
        let unnamed = UnixDatagram::bind_addr(&abstract_name).unwrap();
        send(OsStr::new(&format!("@{name}")), "STOPPING=1").unwrap();
        assert_eq!(hears(unnamed), "STOPPING=1");
        assert!(send(OsStr::new("/no/such/socket"), "x").is_err());
    }
}
