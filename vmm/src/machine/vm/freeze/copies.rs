//! Copies of what stays, made while the children begin.

use super::{MachineState, Outbox, Stood, Taken, Vm, VmError};
use crate::wire::{FromVm, Frozen};
use guest_mem::window::host::{HostWindow, MovedOut, WindowError};
use guest_mem::{Gfn, GfnRange, StoreId};
use nix::sched::{sched_getaffinity, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

impl Vm {
    /// Copies what a freeze leaves where it is. Children do not wait for it: the server is told of all while it is copied, when
    /// the pages are there that they need `first`.
    pub(super) fn copy_behind(
        &self,
        begun: &Frozen,
        first: &[Gfn],
        moved: &MovedOut,
        stood: Stood,
        out: &mut Outbox<'_>,
    ) -> Result<(Taken, MachineState), VmError> {
        let store = begun.store;
        let mut first = first.iter().copied().peekable();
        let urgent = |pages: &&GfnRange| {
            while first.next_if(|gfn| *gfn < pages.start()).is_some() {}
            first.peek().is_some_and(|gfn| pages.contains(*gfn))
        };
        let (first, rest): (Vec<GfnRange>, Vec<GfnRange>) = moved.copies().iter().partition(urgent);
        let next = AtomicUsize::new(0);
        let copy_rest = || copy_in_turns(&self.window, store, &rest, &next);
        let here = sched_getcpu();
        let (told, copied) = thread::scope(|scope| {
            let other = thread::Builder::new().spawn_scoped(scope, || {
                here.iter().for_each(|here| avoid(*here));
                copy_rest()
            });
            let told = self.copy_and_tell(begun, first, moved, stood, out);
            let copied = copy_rest();
            let others = other.map_or(Ok(()), |other| other.join().expect("copies do not panic"));
            (told, copied.and(others))
        });
        let told = told?;
        copied.map_err(VmError::Harvest)?;
        // Before a vCPU runs: of a process that ends without these words, the window is what was frozen.
        out.tell_for_good(FromVm::Copied { store }).map_err(VmError::Server)?;
        Ok(told)
    }

    /// Copies the pages that children need first, and tells the server of all that was taken, and how the machine stands.
    fn copy_and_tell(
        &self,
        begun: &Frozen,
        first: Vec<GfnRange>,
        moved: &MovedOut,
        stood: Stood,
        out: &mut Outbox<'_>,
    ) -> Result<(Taken, MachineState), VmError> {
        self.window.copy(begun.store, &first).map_err(VmError::Harvest)?;
        let state = self.state(stood)?;
        let frozen = Frozen { copied: Some(first), ..self.look(begun, moved)? };
        let harvest = frozen.harvest.clone();
        out.hold(FromVm::Frozen(Box::new(frozen)));
        out.tell(self.saved(begun.store, begun.activity, &state)).map_err(VmError::Server)?;
        Ok((Taken::Told(harvest), state))
    }
}

/// Has this thread run on other processors than this one, if there are others.
fn avoid(processor: usize) {
    let thread = Pid::from_raw(0);
    let others = sched_getaffinity(thread).and_then(|mut set| {
        set.unset(processor)?;
        sched_setaffinity(thread, &set)
    });
    others.unwrap_or_else(|error| log::debug!("stay on processor {processor}: {error}"));
}

/// Copies stretches together with other threads, some at a time: `next` is the first that nobody has begun.
///
/// Where there are few processors, the server and the children need them meanwhile, for a moment each. They would wait until
/// all is copied: so they go first, unless it is somebody else who wants the processor, and for longer.
fn copy_in_turns(
    window: &HostWindow,
    store: StoreId,
    pages: &[GfnRange],
    next: &AtomicUsize,
) -> Result<(), WindowError> {
    const SOME: usize = 16;
    const MOMENT: Duration = Duration::from_millis(1);
    let mut gives_way = true;
    loop {
        let from = next.fetch_add(SOME, Ordering::Relaxed).min(pages.len());
        let some = &pages[from..pages.len().min(from + SOME)];
        if some.is_empty() {
            return Ok(());
        }
        window.copy(store, some)?;
        if gives_way {
            let before = Instant::now();
            thread::yield_now();
            gives_way = before.elapsed() < MOMENT;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::skips::{Lack, skip};

    #[test]
    fn a_thread_avoids_a_processor_if_there_are_others() {
        let processors = || {
            let set = sched_getaffinity(Pid::from_raw(0)).unwrap();
            (0..1024).filter(|&processor| set.is_set(processor).unwrap()).collect::<Vec<usize>>()
        };
        let all = processors();
        if all.len() < 2 {
            return skip(Lack::Processors, "there is one processor, and nothing to avoid it for");
        }
        thread::spawn(move || {
            let here = sched_getcpu().unwrap();
            avoid(here);
            let rest: Vec<usize> = all.iter().copied().filter(|processor| *processor != here).collect();
            assert_eq!(processors(), rest);
            assert!(rest.contains(&sched_getcpu().unwrap()));
            // The last one is not taken away.
            rest.iter().for_each(|processor| avoid(*processor));
            assert_eq!(processors(), rest[rest.len() - 1..]);
        })
        .join()
        .unwrap();
    }
}
