//! QEMU serves the socket, the back-end connects to it, and comes back after its death.

use lab::{Backend, Bed, GUEST_IP, PATIENCE, ping, scenario, there_and_back};

#[test]
fn qemu_as_socket_server() {
    scenario("qemu_as_socket_server", |lab| {
        let mut bed = Bed::start(lab, |backend, guest| {
            // The back-end starts first and tries until QEMU is there.
            backend.client = true;
            guest.is_server = true;
        })?;
        ping(&bed.netns, GUEST_IP, 3, PATIENCE)?;
        there_and_back(&bed.netns, &mut bed.guest, 5_000_000)?;

        bed.backend.kill()?;
        bed.backend = Backend::start(lab, &bed.netns, &bed.backend_config)?;
        ping(&bed.netns, GUEST_IP, 3, PATIENCE)?;
        there_and_back(&bed.netns, &mut bed.guest, 5_000_000)?;
        bed.stop()
    });
}
