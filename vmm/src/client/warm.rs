//! A VM that is brought up once, and forked for each test.

use super::{Client, Error, ForkOptions, LaunchOptions, Scoped, Vm};
use std::num::NonZero;
use std::panic::resume_unwind;
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Brings a VM up: launches it, and has `bring_up` do all that each test would have to wait for. If that fails, the VM goes.
///
/// ```no_run
/// use std::time::Duration;
/// use vmm::client::{Client, Error, LaunchOptions, warm};
///
/// fn main() -> Result<(), Error> {
///     let client = Client::builder().connect()?;
///     let patience = Duration::from_secs(30);
///     // 64 MiB of state that was dear to come by.
///     let warm = warm(&client, LaunchOptions::new(), |vm| vm.send("fill 64 16384 1", patience).map(drop))?;
///     let sums = warm.fork_each(1..=20, |vm, seed| {
///         vm.send(&format!("fill 64 1 {seed}"), patience)?; // nobody else sees this
///         vm.send("sum 64 16384", patience)
///     })?;
///     assert_eq!(sums.len(), 20);
///     Ok(())
/// }
/// ```
///
/// # Errors
/// Of the launch, or of `bring_up`.
pub fn warm<E: From<Error>>(
    client: &Client,
    options: LaunchOptions,
    bring_up: impl FnOnce(&Vm) -> Result<(), E>,
) -> Result<Warm, E> {
    let vm = client.launch(options)?.scoped();
    bring_up(&vm)?;
    Ok(Warm(vm))
}

/// A VM that has been brought up. It is removed when this is dropped; one in a `static`, which never is, goes with its server.
#[derive(Debug)]
pub struct Warm(Scoped);

impl Warm {
    /// The VM itself. What is done to it, all forks of later see.
    pub fn vm(&self) -> &Vm {
        &self.0
    }

    /// A fork for one test, removed when it is dropped.
    ///
    /// # Errors
    /// Of the fork.
    pub fn fork(&self) -> Result<Scoped, Error> {
        Ok(self.0.fork(ForkOptions::new())?.remove(0).vm.scoped())
    }

    /// Runs `test` once for each case, each on a fork of its own: as many at a time as the host has processors. All are run, and
    /// all forks are gone when this returns. The results come in the order of the cases.
    ///
    /// # Errors
    /// The first that a test, or a fork for one, came to.
    ///
    /// # Panics
    /// If a test does, when all others are done.
    pub fn fork_each<T: Send, R: Send, E: From<Error> + Send>(
        &self,
        cases: impl IntoIterator<Item = T, IntoIter: Send>,
        test: impl Fn(&Vm, T) -> Result<R, E> + Sync,
    ) -> Result<Vec<R>, E> {
        let cases = Mutex::new(cases.into_iter().enumerate());
        let at_once = thread::available_parallelism().map_or(1, NonZero::get);
        let work = || {
            let mut done = Vec::new();
            loop {
                let next = cases.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some((number, case)) = next else { return done };
                let result = self.fork().map_err(E::from).and_then(|vm| test(&vm, case));
                done.push((number, result));
            }
        };
        let mut results = thread::scope(|scope| {
            let workers: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
            let ended: Vec<_> = workers.into_iter().map(thread::ScopedJoinHandle::join).collect();
            ended.into_iter().flat_map(|done| done.unwrap_or_else(|panic| resume_unwind(panic))).collect::<Vec<_>>()
        });
        results.sort_by_key(|(number, _)| *number);
        results.into_iter().map(|(_, result)| result).collect()
    }
}
