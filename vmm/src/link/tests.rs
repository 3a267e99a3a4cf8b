use super::*;
use nix::unistd::pipe;

fn pair() -> (Link, Link) {
    let (ours, theirs) = Link::pair().unwrap();
    (ours, Link::new(theirs))
}

fn inject(link: &Link, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    assert!(link.offer(bytes, fds).unwrap());
}

#[test]
fn messages_arrive_in_order_and_nothing_is_nothing() {
    let (mut ours, mut theirs) = pair();
    assert!(ours.recv::<String>().unwrap().is_none());
    ours.send(&"one", &[]).unwrap();
    ours.send(&"two", &[]).unwrap();
    assert_eq!(theirs.recv::<String>().unwrap().unwrap().0, "one");
    assert_eq!(theirs.recv::<String>().unwrap().unwrap().0, "two");
}

#[test]
fn long_messages_and_many_descriptors_arrive_whole() {
    let (mut ours, mut theirs) = pair();
    let text = "x".repeat(1 << 20);
    let stdin = io::stdin();
    let many = vec![stdin.as_fd(); 600];
    ours.send(&text, &many).unwrap();
    ours.send(&"after", &[]).unwrap();
    let (got, fds) = theirs.recv::<String>().unwrap().unwrap();
    assert_eq!((got.len(), fds.len()), (1 << 20, 600));
    assert_eq!(theirs.recv::<String>().unwrap().unwrap().0, "after");
    let flags = fcntl(&fds[599], FcntlArg::F_GETFD).unwrap();
    assert_eq!(flags & nix::libc::FD_CLOEXEC, nix::libc::FD_CLOEXEC);
}

#[test]
fn what_the_socket_does_not_take_is_queued_and_never_waited_for() {
    let (mut ours, mut theirs) = pair();
    let (read, _write) = pipe().unwrap();
    for number in 0..1000_u32 {
        ours.send(&(number, "y".repeat(4000)), &[read.as_fd()]).unwrap();
    }
    assert!(ours.flush().unwrap(), "the socket cannot have taken 4 MB");
    for number in 0..1000_u32 {
        let ((got, _), fds) = theirs.recv::<(u32, String)>().unwrap().unwrap();
        assert_eq!((got, fds.len()), (number, 1));
        ours.flush().unwrap();
    }
    assert!(!ours.flush().unwrap());
}

#[test]
fn the_end_is_an_error() {
    let (mut ours, theirs) = pair();
    drop(theirs);
    assert_eq!(ours.recv::<u8>().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    assert!(ours.send(&1_u8, &[]).is_err());
}

#[test]
fn malformed_packets_are_errors() {
    let (read, _write) = pipe().unwrap();
    let header = |kind: u8, count: u32| {
        let [a, b, c, d] = count.to_le_bytes();
        vec![kind, a, b, c, d]
    };
    let long_text = [header(0, 0), vec![0xff; 30]].concat();
    type Case<'a> = (&'a str, Vec<u8>, Vec<BorrowedFd<'a>>);
    let cases: Vec<Case<'_>> = vec![
        ("no header", vec![0, 0], vec![]),
        ("unknown kind", header(9, 0), vec![]),
        ("no file", header(1, 0), vec![]),
        ("a pipe as file", header(1, 0), vec![read.as_fd()]),
        ("more of nothing", header(2, 1), vec![read.as_fd()]),
        ("uncounted descriptors", header(0, 0), vec![read.as_fd()]),
        ("absurd count", header(0, u32::MAX), vec![]),
        ("no text", long_text, vec![]),
    ];
    for (what, bytes, fds) in cases {
        let (mut ours, theirs) = pair();
        inject(&theirs, &bytes, &fds);
        let error = ours.recv::<String>().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{what}: {error}");
    }
}

#[test]
fn a_message_in_an_unsealed_file_is_refused() {
    let (mut ours, theirs) = pair();
    let file = memfd_create(c"open", MFdFlags::MFD_ALLOW_SEALING).unwrap();
    inject(&theirs, &[1, 0, 0, 0, 0], &[file.as_fd()]);
    assert_eq!(ours.recv::<String>().unwrap_err().kind(), io::ErrorKind::InvalidData);
}
