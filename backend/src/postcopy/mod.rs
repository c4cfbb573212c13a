//! Postcopy migration to here: guest memory that another process supplies page by page while the guest runs.
//!
//! ```text
//!  pair: a ring parks ─ Wants ─► Engine ─ Populate ─► reactor (io-wq) ─ fault ─► userfaultfd ─► front-end
//!        rings look again ◄─ Arrived ─ ResidencyMap ◄─ completion ◄──────── page, wake ◄───────────┘
//!                                           ▲
//!                                    presence: what came by itself
//! ```
//! Lives here: the userfaultfd ([`uffd`]), which pages are asked for and in what order ([`engine`], pure), and how pages are
//! found that came without being asked for ([`presence`]). Not here: the protocol's phases (`session::postcopy`), which pages
//! a ring needs (`virtq::lookahead`), and who carries all this out (`port::postcopy`).
//!
//! **Nothing here may end a wait by making a page.** A populate cannot be cancelled, and taking the userfaultfd away from
//! under it makes it succeed: with a page of zeros in the guest's memory. So a region with populates under way is first
//! replaced by nothing (`Mapping::give_up`), then woken; its populates fail, and the hole stays a hole.

pub mod engine;
pub mod presence;
pub mod uffd;

#[cfg(test)]
mod teardown_tests;
