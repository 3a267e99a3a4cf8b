//! A bare userfaultfd fault: a minimal loop answers a touch with some pages, by copies into the file behind, and a wake.

use super::{numbers, serve};
use crate::bare::memory::Show;
use crate::bare::uffd::{Trap, Uffd};
use crate::bare::{MemoryFile, PAGE, Window};
use crate::{Result, fail};
use std::sync::Arc;

/// Bytes that can be touched, and pages that an answer brings. Answers `where`: the host address of the first byte, for
/// whoever reads it from outside.
pub fn run(arguments: &[u64]) -> Result<()> {
    let [len, pages] = numbers(arguments)?;
    let file = MemoryFile::new(len)?;
    let window = Arc::new(Window::showing(len, Show::Private(&file))?);
    let store = Window::showing(len, Show::Shared(&file))?;
    let (traps, fill) = (Uffd::new()?, Uffd::new()?);
    traps.register(&window, 0, len, Trap::Missing)?;
    fill.register(&store, 0, len, Trap::Missing)?;
    let base = window.base();
    std::thread::spawn(move || {
        let answer = || -> Result<()> {
            let bytes = vec![1; (pages * PAGE) as usize];
            loop {
                let at = (traps.read()? - window.base()) / (pages * PAGE) * (pages * PAGE);
                fill.copy(&store, at, &bytes)?;
                traps.wake(&window, at, pages * PAGE)?;
            }
        };
        if let Err(error) = answer() {
            eprintln!("fault: {error}");
            std::process::exit(1);
        }
    });
    serve(|verb, _| match verb {
        // Exact: it has fewer than 53 bits.
        "where" => Ok(vec![base as f64]),
        _ => fail("where"),
    })
}
